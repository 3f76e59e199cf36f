"""Whether what is installed fits together, by the ranges that the package declares."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

OVERRIDE_VARIABLE = "OBSERVE_R1_ANY_VERSIONS"  # set to anything: try versions outside of the ranges
OPTIONAL = ("vllm", "deepspeed", "lora", "parquet", "eval")  # extras that are looked at where they are installed


def check_versions() -> None:
    """Looks at every declared dependency, and at those optional ones that are installed.

    Raises:
        ValueError: One is missing or outside of its range.
    """
    if os.environ.get(OVERRIDE_VARIABLE):
        return
    try:
        declared = requires("observe-r1")
    except PackageNotFoundError:  # run from its sources: nothing was declared
        return
    wrong = [*misfits(declared or [])]
    if wrong:
        found = "; ".join(f"{have}, and observe-r1 needs {need}" for have, need in wrong)
        install = " ".join(f"'{need}'" for _, need in wrong)
        raise ValueError(
            f"The installed packages do not fit together: {found}. What fits: pip install {install}. To try it all the "
            f"same: {OVERRIDE_VARIABLE}=1."
        )


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def misfits(declared: list[str]) -> Iterator[tuple[str, str]]:
    """What is installed, and what is needed instead, for every requirement that is not met."""
    for text in declared:
        requirement = Requirement(text)
        if requirement.name == "observe-r1":
            continue
        applies = {extra: _applies(requirement, extra) for extra in ("", *OPTIONAL)}
        if not any(applies.values()):
            continue
        optional = not applies[""]
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            if not optional:
                yield f"{requirement.name} is not installed", f"{requirement.name}{requirement.specifier}"
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            yield f"{requirement.name} {installed} is installed", f"{requirement.name}{requirement.specifier}"
