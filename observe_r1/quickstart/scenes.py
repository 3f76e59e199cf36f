"""Scenes of coloured shapes: what is on the table, and how it is painted."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageDraw

Size = Literal["small", "large"]

IMAGE_SIDE = 112  # pixels; 16 visual tokens at patch 14 and merge 2
GRID_SIDE = 4
CELL = IMAGE_SIDE // GRID_SIDE
BACKGROUND = (246, 246, 240)
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "orange": (255, 150, 20),
    "green": (44, 160, 60),
    "blue": (31, 90, 220),
    "purple": (150, 60, 190),
    "black": (30, 30, 30),
}
KINDS = ("circle", "square", "triangle", "cross")
RADII: dict[Size, tuple[int, int]] = {"small": (4, 5), "large": (9, 11)}  # pixels, both ends included


@dataclass(frozen=True, slots=True)
class Shape:
    """One painted shape, in pixels. Shapes of a scene never touch: each keeps to its own cell of the grid."""

    kind: str
    color: str
    size: Size
    center: tuple[int, int]
    radius: int


def place(looks: Sequence[tuple[str, str, Size]], rng: random.Random) -> tuple[Shape, ...]:
    """Shapes of the given (kind, color, size), each at a random place in a random cell of its own.

    Raises:
        ValueError: more shapes than the grid has cells.
    """
    cells = GRID_SIDE * GRID_SIDE
    if len(looks) > cells:
        raise ValueError(f"{len(looks)} shapes do not fit the grid: ask for at most {cells}")
    shapes = []
    for cell, (kind, color, size) in zip(rng.sample(range(cells), len(looks)), looks, strict=True):
        radius = rng.randint(*RADII[size])
        room = CELL // 2 - radius - 1  # one pixel of background between neighbours
        row, column = divmod(cell, GRID_SIDE)
        x = column * CELL + CELL // 2 + rng.randint(-room, room)
        y = row * CELL + CELL // 2 + rng.randint(-room, room)
        shapes.append(Shape(kind, color, size, (x, y), radius))
    return tuple(shapes)


def paint(shapes: Sequence[Shape]) -> Image.Image:
    """An RGB picture of `IMAGE_SIDE` × `IMAGE_SIDE` pixels, without antialiasing: every pixel has an exact colour."""
    image = Image.new("RGB", (IMAGE_SIDE, IMAGE_SIDE), BACKGROUND)
    draw = ImageDraw.Draw(image)
    for shape in shapes:
        (x, y), r, fill = shape.center, shape.radius, COLORS[shape.color]
        if shape.kind == "circle":
            draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        elif shape.kind == "square":
            draw.rectangle((x - r, y - r, x + r, y + r), fill=fill)
        elif shape.kind == "triangle":
            draw.polygon(((x, y - r), (x - r, y + r), (x + r, y + r)), fill=fill)
        elif shape.kind == "cross":
            arm = r // 3
            draw.rectangle((x - r, y - arm, x + r, y + arm), fill=fill)
            draw.rectangle((x - arm, y - r, x + arm, y + r), fill=fill)
        else:
            raise ValueError(f"cannot paint a {shape.kind!r}: the kinds are {', '.join(KINDS)}")
    return image
