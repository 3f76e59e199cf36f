"""Images as shards hold them: PNG, JPEG or WebP that are known to decode, of bounded size, without transparency."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import ExifTags, Image, UnidentifiedImageError

from observe_r1.ladder.sample import BadSample

DEFAULT_MAX_PIXELS = 64_000_000  # 192 MB as RGB; below the size at which Pillow itself starts to warn
STORED_FORMATS = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp"}  # MPO: a JPEG with further frames
READABLE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # none that starts an interpreter, such as EPS

UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, OverflowError, struct.error, zlib.error)
"""What Pillow raises on damaged PNG, JPEG and WebP data."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by the value of EXIF's Orientation
_EXIF = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")  # where Pillow keeps it, and reads it from


@dataclass(frozen=True)
class StoredImage:
    """An encoded image and the extension of its tar member: `png`, `jpg` or `webp`."""

    data: bytes
    extension: str


def check_header(data: bytes, max_pixels: int, formats: tuple[str, ...] = ("PNG", "JPEG", "WEBP")) -> Image.Image:
    """The image opened but not decoded, once its header shows a known format and an acceptable size.

    Raises:
        BadSample: `image_corrupt`, `image_too_large` or `image_unsupported`.
    """
    with decoding():
        image = Image.open(io.BytesIO(data), formats=formats)
    width, height = image.size
    if width * height > max_pixels:
        raise BadSample("image_too_large", f"{width} x {height} pixels, the limit is {max_pixels}")
    if image.mode.startswith(("I", "F")):
        raise BadSample("image_unsupported", f"pixels of type {image.mode}; convert the image to 8 bits per channel")
    return image


def load_rgb(name: str, data: bytes, max_pixels: int) -> Image.Image:
    """The decoded image of a tar member, as a viewer shows it.

    Raises:
        BadSample: `image_corrupt`, `image_too_large` or `image_unsupported`, with the member's name.
    """
    try:
        image = check_header(data, max_pixels)
        with decoding():
            image.load()
            return upright(image).convert("RGB")
    except BadSample as bad:
        raise BadSample(bad.reason, f"{name}: {bad.detail}") from bad.__cause__


def store_image(image: bytes | Image.Image, max_pixels: int = DEFAULT_MAX_PIXELS) -> StoredImage:
    """The image as a shard will hold it: encoded bytes are kept where they can be, anything else becomes a PNG.

    Every image is decoded once, so that a damaged one is found here and not in the middle of a run. Transparent parts
    become white: decoders that only drop the alpha channel would show a diagram drawn on nothing as black on black.

    Args:
        image: A file's content, or a decoded image.
        max_pixels: Largest width × height, read off the header before anything is decoded.

    Raises:
        BadSample: `image_corrupt`, `image_too_large` or `image_unsupported`.
    """
    if isinstance(image, bytes):
        opened = check_header(image, max_pixels, READABLE_FORMATS)
        with decoding():
            opened.load()
        extension = STORED_FORMATS.get(opened.format or "")
        if extension is not None and not _is_transparent(opened):
            return StoredImage(image, extension)
        image = opened
    buffer = io.BytesIO()
    _on_white(upright(image)).save(buffer, format="PNG")
    return StoredImage(buffer.getvalue(), "png")


def upright(image: Image.Image) -> Image.Image:
    """A loaded image as viewers show it: cameras store what the sensor saw, and in EXIF how it has to be turned."""
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (*UNREADABLE, TypeError, LookupError):  # damaged EXIF says nothing about the pixels
        turn = None
    if turn is None:
        return image
    turned = image.transpose(turn)
    for name in _EXIF:  # vLLM, or whoever stores it again, would turn it once more
        turned.info.pop(name, None)
    return turned


@contextmanager
def decoding() -> Iterator[None]:
    """What Pillow raises on damaged data, as `BadSample`."""
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSample("image_too_large", str(error)) from error
    except UnidentifiedImageError as error:  # whose own words hold an address in memory
        raise BadSample("image_corrupt", "not recognised as a picture of a format that can be read") from error
    except (*UNREADABLE, TypeError) as error:  # TypeError: a TIFF tag of another type than it should have
        raise BadSample("image_corrupt", str(error)) from error


def _is_transparent(image: Image.Image) -> bool:
    if not image.has_transparency_data:
        return False
    lowest, _ = image.convert("RGBA").getchannel("A").getextrema()
    return bool(lowest != 255)


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    layers = image.convert("RGBA")
    white = Image.new("RGBA", layers.size, "white")
    return Image.alpha_composite(white, layers).convert("RGB")
