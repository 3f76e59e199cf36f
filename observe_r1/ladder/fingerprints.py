"""What makes two questions the same: the pixels of their images and their words."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence

from PIL import Image

from observe_r1.ladder.images import DEFAULT_MAX_PIXELS, READABLE_FORMATS, check_header, decoding, upright

_MARKERS = re.compile(r"<image(?:[ _]?\d+)?>")
_SPACE = re.compile(r"\s+")


def image_fingerprint(data: bytes, max_pixels: int = DEFAULT_MAX_PIXELS) -> str:
    """Of the pixels: the same picture has the same one as PNG, WebP without loss, or with other metadata.

    Raises:
        BadSample: `image_corrupt`, `image_too_large` or `image_unsupported`.
    """
    image = check_header(data, max_pixels, READABLE_FORMATS)
    with decoding():
        image.load()
    return pixel_fingerprint(upright(image))


def pixel_fingerprint(image: Image.Image) -> str:
    """Of a decoded image; 32 hexadecimal digits."""
    pixels = image.convert("RGB")
    digest = hashlib.sha256(f"{pixels.width}x{pixels.height}:".encode())
    digest.update(pixels.tobytes())
    return digest.hexdigest()[:32]


def normalised_question(text: str) -> str:
    """A question without what differs between copies of it: case, spacing, image markers, the final stop.

    Signs stay: x + 1 and x - 1 are different questions.
    """
    text = unicodedata.normalize("NFKC", _MARKERS.sub(" ", text)).casefold()
    return _SPACE.sub(" ", text).strip().rstrip(" .?:")


def question_fingerprint(text: str, images: Sequence[str]) -> str:
    """Of a question together with the fingerprints of its images."""
    return hashlib.sha256("\0".join([normalised_question(text), *images]).encode()).hexdigest()[:32]
