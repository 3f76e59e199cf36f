"""The names in the pages: the public API is all there, what a page shows of the code exists."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from observe_r1.public_api import PUBLIC

PAGES = Path(__file__).parent.parent.parent / "docs"
SHOWN = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)
API = SHOWN.findall((PAGES / "api.md").read_text().partition("## Losses")[0])


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


def test_the_api_page_has_what_is_public() -> None:
    assert sorted(API) == sorted(f"{module}.{name}" for module, names in PUBLIC.items() for name in names)


@pytest.mark.parametrize("name", API)
def test_arguments_of_public_classes_are_described(name: str) -> None:
    documented = look_up(name)
    if inspect.isclass(documented) and not dataclasses.is_dataclass(documented):  # fields are described beside them
        arguments = inspect.signature(documented).parameters if "__init__" in vars(documented) else ()
        assert [argument for argument in arguments if f"{argument}:" not in str(documented.__doc__)] == []


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda page: page.stem)
def test_code_that_a_page_shows_exists(page: Path) -> None:
    for name in SHOWN.findall(page.read_text()):
        assert look_up(name) is not None
