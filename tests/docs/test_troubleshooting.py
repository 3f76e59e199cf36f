"""The messages that the troubleshooting page quotes are in the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs/troubleshooting.md").read_text()
SOURCES = [file for folder in ("observe_r1", "callbacks", "datamodules") for file in (ROOT / folder).rglob("*.py")]


def strings(file: Path) -> Iterator[str]:
    """The texts of a module as they are seen, with `…` for what is filled in."""
    inner: set[int] = set()
    for node in ast.walk(ast.parse(file.read_text())):  # outer nodes come first
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            inner.update(map(id, ast.walk(node)))
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            yield re.sub(r"%[sdrf]", "…", node.value)


TEXTS = [re.sub(r"\s+", " ", text).casefold() for file in SOURCES for text in strings(file)]
MESSAGES = [row.split(" | ")[0].strip("|` ") for row in PAGE.splitlines() if row.startswith("| `")]


def is_said(message: str) -> bool:
    """Whether one text of the code holds the parts of the message, in their order."""
    pattern = re.compile(".*".join(re.escape(part.strip()) for part in message.casefold().split("…")))
    return any(pattern.search(text) for text in TEXTS)


@pytest.mark.parametrize("message", MESSAGES)
def test_the_message_is_in_the_code(message: str) -> None:
    assert is_said(message)


def test_what_nobody_says_is_found_out() -> None:
    assert len(MESSAGES) > 40
    assert not is_said("policy.pretrained: no … unicorn")
