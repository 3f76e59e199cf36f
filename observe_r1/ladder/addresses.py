"""The encoded bytes of an image that a data set refers to by path, address or data URL."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator, Sequence
from http.client import HTTPException
from pathlib import Path
from urllib.parse import unquote

from observe_r1.ladder.sample import BadSample

TIMEOUT = 30.0  # seconds without an answer
MAX_BYTES = 256 * 1024 * 1024  # of one download; a larger file is no question's picture


def read_image(reference: str, directories: Sequence[Path], image_root: Path | None = None) -> bytes:
    """The file behind `reference`, as it is encoded there.

    Args:
        reference: `http(s)://…`, `data:image/…`, `file://…`, or a path. Relative paths are looked up below `image_root`
            and then `directories`; an absolute path that does not exist here is looked up below `image_root`.
        directories: Where the data set lies.
        image_root: Where its images lie.

    Raises:
        BadSample: `image_missing`, with what was tried.
    """
    if reference.startswith(("http://", "https://", "data:")):
        return _download(reference)
    tried = list(dict.fromkeys(_candidates(reference, directories, image_root)))
    try:
        for path in tried:
            if path.is_file():
                return path.read_bytes()
    except OSError as error:  # a name that is too long, a directory that may not be entered
        hint = "; encoded images as text are written data:image/png;base64,…" if len(reference) > 255 else ""
        raise BadSample("image_missing", f"{reference:.200}: {error.strerror}{hint}") from error
    raise BadSample("image_missing", "no file " + " or ".join(str(path) for path in tried))


def _candidates(reference: str, directories: Sequence[Path], image_root: Path | None) -> Iterator[Path]:
    name = reference.removeprefix("file://")
    for path in (Path(name), Path(unquote(name))):
        if path.is_absolute():
            yield path
        if image_root is not None:
            yield image_root / path.relative_to(path.anchor)
        if not path.is_absolute():
            yield from (directory / path for directory in directories)


def _download(address: str) -> bytes:
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT) as response:
            content: bytes = response.read(MAX_BYTES + 1)
    except (OSError, ValueError, HTTPException) as error:  # ValueError: an address or a data URL that is none
        raise BadSample("image_missing", f"{address:.200}: {error}") from error
    if len(content) > MAX_BYTES:
        raise BadSample("image_too_large", f"{address:.200}: more than {MAX_BYTES} bytes")
    return content
