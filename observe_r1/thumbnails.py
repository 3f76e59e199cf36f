"""Small pictures: as files of a run directory and inside of HTML pages."""

from __future__ import annotations

import base64
import io

from PIL import Image

LONGER_SIDE = 320  # pixels
SMALL_FILE = 40_000  # bytes up to which nothing is gained by losing detail
MIME = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}


def thumbnail(image: Image.Image, longer_side: int = LONGER_SIDE) -> tuple[bytes, str]:
    """A picture no larger than this, encoded, and its extension: PNG where that is small, JPEG elsewhere."""
    small = image.convert("RGB")
    small.thumbnail((longer_side, longer_side))
    encoded = _encoded(small, "PNG")
    return (encoded, "png") if len(encoded) <= SMALL_FILE else (_encoded(small, "JPEG"), "jpg")


def data_address(data: bytes, extension: str) -> str:
    """An encoded picture as an address that needs no file; `extension` is png, jpg or webp."""
    return f"data:{MIME[extension]};base64,{base64.b64encode(data).decode()}"


def _encoded(image: Image.Image, format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, quality=80)
    return buffer.getvalue()
