"""Pictures inside of the page, up to a limit."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from observe_r1.thumbnails import MIME, data_address, thumbnail

MOST_BYTES = 6_000_000  # of all pictures of a page, before base64 makes them a third longer
LARGEST_FILE = 60_000  # that is taken as it is


class Pictures:
    """Gives addresses of pictures, and counts those that it cannot give."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.left = most_bytes
        self.left_out = 0
        self.broken = 0

    def address(self, path: Path, longer_side: int = 320) -> str | None:
        """The picture as a data address; None where it is missing, broken or beyond the limit."""
        try:
            data, extension = path.read_bytes(), path.suffix.lstrip(".")
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                if len(data) > LARGEST_FILE or extension not in MIME:
                    data, extension = thumbnail(image, longer_side)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            self.broken += 1
            return None
        if len(data) > self.left:
            self.left_out += 1
            return None
        self.left -= len(data)
        return data_address(data, extension)
