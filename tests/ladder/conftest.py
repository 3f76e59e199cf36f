"""Samples, images and tars to build ladders from."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from observe_r1.ladder.images import StoredImage
from observe_r1.ladder.sample import Sample

EncodeImage = Callable[..., bytes]
MakeSample = Callable[..., Sample[StoredImage]]
WriteTar = Callable[..., Path]


@pytest.fixture(scope="session")
def encoded() -> EncodeImage:
    """Encoded bytes of a one-coloured image."""

    def encode(color: Any = "red", size: tuple[int, int] = (8, 6), format: str = "PNG", mode: str = "RGB") -> bytes:
        buffer = io.BytesIO()
        Image.new(mode, size, color).save(buffer, format=format)
        return buffer.getvalue()

    return encode


@pytest.fixture(scope="session")
def make_sample(encoded: EncodeImage) -> MakeSample:
    """A valid sample with as many images as asked for."""

    def make(number: int = 0, n_images: int = 1, **fields: Any) -> Sample[StoredImage]:
        items = [{"type": "image", "index": index} for index in range(n_images)]
        content = [*items, {"type": "text", "text": f"How many in picture {number}?"}]
        images = [StoredImage(encoded((number % 256, index, 0)), "png") for index in range(n_images)]
        values = {"id": f"geo.3k-{number}", "messages": [{"role": "user", "content": content}], "answer": str(number)}
        return Sample(images=images, **{**values, **fields})

    return make


@pytest.fixture(scope="session")
def document() -> Callable[..., dict[str, Any]]:
    """The JSON of a valid sample with `n_images` images, some fields replaced; None removes a field."""

    def make(n_images: int = 1, **fields: Any) -> dict[str, Any]:
        items = [{"type": "image", "index": index} for index in range(n_images)]
        content = [*items, {"type": "text", "text": "How many?"}]
        values = {"id": "a", "messages": [{"role": "user", "content": content}], "answer": "3", **fields}
        return {name: value for name, value in values.items() if value is not None}

    return make


@pytest.fixture(scope="session")
def write_tar() -> WriteTar:
    """A tar as some other tool writes it, from (name, content) pairs; a dict is written as JSON."""

    def write(path: Path, members: Sequence[tuple[str, Any]], format: int = tarfile.PAX_FORMAT) -> Path:
        with tarfile.open(path, "w", format=format) as tar:
            for name, content in members:
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        return path

    return write
