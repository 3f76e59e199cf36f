"""The names in the pages: the public API is all there and documented, what a page shows of the code exists."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

PAGES = Path(__file__).parent.parent.parent / "docs"
SHOWN = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)
PUBLIC_PACKAGES = ("rewards", "callbacks", "datamodules", "rollout", "evaluation")
API = SHOWN.findall((PAGES / "api.md").read_text())


def look_up(name: str) -> Any:
    """An object by its dotted path."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:depth]))
        except ModuleNotFoundError:
            continue
        for part in parts[depth:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("package", PUBLIC_PACKAGES)
def test_what_a_package_offers_is_in_the_api(package: str) -> None:
    offered = {f"observe_r1.{package}.{name}" for name in importlib.import_module(f"observe_r1.{package}").__all__}
    assert offered == {name for name in API if name.rpartition(".")[0] == f"observe_r1.{package}"}


@pytest.mark.parametrize("name", API)
def test_public_names_are_documented(name: str) -> None:
    """By a docstring of their own, with every argument where there are any."""
    documented = look_up(name)
    docstring = vars(documented).get("__doc__") if inspect.isclass(documented) else documented.__doc__
    assert docstring, "no docstring"
    assert not docstring.startswith(f"{documented.__name__}("), "the docstring of a dataclass that has none"
    if inspect.isclass(documented) and not dataclasses.is_dataclass(documented):  # fields are described beside them
        arguments = inspect.signature(documented).parameters if "__init__" in vars(documented) else ()
        assert [argument for argument in arguments if f"{argument}:" not in docstring] == []


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda page: page.stem)
def test_code_that_a_page_shows_exists(page: Path) -> None:
    for name in SHOWN.findall(page.read_text()):
        assert look_up(name) is not None
