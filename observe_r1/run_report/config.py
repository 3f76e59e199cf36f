"""The config of a run against the shipped config that it comes from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

IGNORED = re.compile(
    r"^(seed_everything|trainer\.logger|data\.init_args\.(ladder|held_out|directory))\b"
)  # of no recipe


@dataclass(frozen=True)
class Comparison:
    """The shipped config that most of its values agree with, and what differs from it."""

    name: str
    differences: list[tuple[str, str, str]]  # option, shipped, here


def compare(config: dict[str, Any]) -> Comparison | None:
    """Against the closest of the shipped experiments; None where fewer than half of the values agree with any."""
    if not config:
        return None
    mine = dict(_leaves(config))
    best: tuple[float, Comparison] | None = None
    for name, shipped in _shipped().items():
        # a class without arguments may be given by its name alone
        here = {key: mine.get(key, mine.get(f"{key}.class_path", "not set")) for key in shipped}
        differences = [
            (key, _said(value), _said(here[key]))
            for key, value in shipped.items()
            if not IGNORED.match(key) and not _same(here[key], value)
        ]
        agreement = 1 - len(differences) / max(len(shipped), 1)
        if agreement >= 0.5 and (best is None or agreement > best[0]):
            best = agreement, Comparison(name, differences)
    return None if best is None else best[1]


@cache
def _shipped() -> dict[str, dict[str, Any]]:
    """Options of the shipped experiments by file name."""
    found = [path for path in files("observe_r1.configs").iterdir() if path.name.endswith(".yaml")]
    return {path.name: dict(_leaves(yaml.safe_load(path.read_text(encoding="utf-8")))) for path in found}


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Options by their dotted name; items of a list with a class_path by its last part, others as one value."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and value and all(isinstance(item, dict) and "class_path" in item for item in value):
        for item in value:
            yield from _leaves(item, f"{name}.{str(item['class_path']).rpartition('.')[2]}")
    else:
        yield name, value


def _same(mine: Any, shipped: Any) -> bool:
    if isinstance(mine, int | float) and isinstance(shipped, int | float):
        return float(mine) == float(shipped)
    return mine == shipped or str(mine) == str(shipped)


def _said(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
