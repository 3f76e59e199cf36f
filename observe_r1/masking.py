"""What is secret in a configuration is left out of what others may read: reports, and loggers of other machines."""

from __future__ import annotations

import re
from typing import Any

SECRET = re.compile(r"(^|[_.-])(api_?key|key|token|secret|password|passwd|credentials?|connection_string)$", re.I)
PRIVATE = "storage_options"  # of a file system: whatever stands there
USER = re.compile(r"(\w+://)[^\s/@]+@")  # user:password@host
QUERY = re.compile(r"(\w+://[^\s?#]+)\?[^\s#]*")  # signatures of addresses
LINE = re.compile(r"(?m)^(\s*(?:-\s+)?([\w.-]+)\s*:\s+)(?!null\b)\S.*$")
LEFT_OUT = "…"


def masked(value: Any, is_secret: bool = False) -> Any:
    """The same structure, where strings that are secret, or parts of them, are left out."""
    if isinstance(value, dict):
        return {
            name: masked(inner, is_secret or name == PRIVATE or SECRET.search(str(name)) is not None)
            for name, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [masked(inner, is_secret) for inner in value]
    if not isinstance(value, str):
        return value
    return LEFT_OUT if is_secret else _without_access(value)


def masked_text(text: str) -> str:
    """The same for the text of a configuration that cannot be parsed, line by line."""
    lines = LINE.sub(lambda line: f"{line[1]}{LEFT_OUT}" if SECRET.search(line[2]) else line[0], text)
    return _without_access(lines)


def _without_access(text: str) -> str:
    return QUERY.sub(rf"\1?{LEFT_OUT}", USER.sub(rf"\1{LEFT_OUT}@", text))
