"""Benchmarks whose questions are rows of parquet files."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from observe_r1.evaluation.benchmark import Benchmark
from observe_r1.evaluation.item import Item
from observe_r1.evaluation.parquet import ParquetTable, locate_parquet

if TYPE_CHECKING:
    from observe_r1.experience import Message, Prompt

IMAGE_MARKER = re.compile(r"<image (\d+)>")
MAX_IMAGE_PIXELS = 64_000_000  # as for ladders


class ParquetBenchmark(Benchmark):
    """Questions from parquet files. A subclass names its columns and turns a row into an `Item` and a text.

    Args:
        source: A parquet file, a directory or glob of such files, or a data set on the hub.
        split: Of the data set.
        max_image_pixels: Larger pictures are refused before they are decoded.
    """

    columns: ClassVar[Sequence[str]]
    """Without pictures, read at once; all of them are required."""
    image_columns: ClassVar[Sequence[str]]
    """Read when a question is asked; the first is required. A picture is `{bytes, path}`, as the hub stores it."""

    def __init__(self, source: str, split: str, max_image_pixels: int = MAX_IMAGE_PIXELS) -> None:
        self.source = source
        self.split = split
        self.max_image_pixels = max_image_pixels

    @abstractmethod
    def item(self, row: Mapping[str, Any]) -> Item:
        """What scoring needs of a row."""

    @abstractmethod
    def text(self, row: Mapping[str, Any]) -> str:
        """The question as it is asked.

        `<image 2>` stands for the picture in the second image column; pictures without such a place come first.
        """

    @cached_property
    def items(self) -> Sequence[Item]:
        # found whatever becomes of an item
        rows = self._rows
        try:
            items = [self.item(row) for row in rows]
        except (KeyError, TypeError, ValueError, SyntaxError) as error:
            raise ValueError(f"{self.name}: {self.source!r} is not in the published form: {error!r}") from error
        for item in items:
            if not item.answer or item.answer == "?":
                raise ValueError(
                    f"{self.name}: question {item.id!r} of split {self.split!r} has no public answer; use the split "
                    "that has (testmini of MathVista, validation of MMMU)"
                )
        if len({item.id for item in items}) < len(items):
            raise ValueError(f"{self.name}: {self.source!r} holds questions twice; give one split, or one copy of it")
        return items

    def prompt(self, position: int) -> Prompt:
        from observe_r1.answers import Gold
        from observe_r1.experience import Prompt

        item = self.items[position]
        stored = self._table.row(position, self.image_columns)
        pictures = {number + 1: stored[name] for number, name in enumerate(self.image_columns) if stored[name]}
        messages, order = interleave(self.text(self._rows[position]), pictures)
        images = [decode(pictures[number], self.max_image_pixels) for number in order]
        return Prompt(item.id, self.name, messages, images, Gold(str(item.answer), "text"), position)

    @cached_property
    def _table(self) -> ParquetTable:
        try:
            return ParquetTable(locate_parquet(self.source, self.split), [*self.columns, self.image_columns[0]])
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        rows = self._table.columns(self.columns)
        if not rows:
            raise ValueError(f"{self.name}: {self.source!r} has no rows")
        return rows


def interleave(text: str, pictures: Mapping[int, Any]) -> tuple[list[Message], list[int]]:
    """A user message with the pictures where the text has their markers, and the numbers of the pictures in order.

    A marker that comes again stays text, so that a picture is read once; so does one without a picture. Pictures
    without a marker come first.
    """
    marked = {int(number) for number in IMAGE_MARKER.findall(text)}
    order = sorted(set(pictures) - marked)
    content: list[dict[str, Any]] = [{"type": "image", "index": index} for index in range(len(order))]
    start = 0
    for marker in IMAGE_MARKER.finditer(text):
        number = int(marker[1])
        if number not in pictures or number in order:
            continue
        if before := text[start : marker.start()]:
            content.append({"type": "text", "text": before})
        content.append({"type": "image", "index": len(order)})
        order.append(number)
        start = marker.end()
    if rest := text[start:]:
        content.append({"type": "text", "text": rest})
    return [{"role": "user", "content": content}], order


def decode(stored: Mapping[str, Any], max_pixels: int) -> Any:
    """The picture of an image column as RGB, upright, transparent parts white.

    Raises:
        ValueError: It is damaged, too large, or only a path is stored.
    """
    from observe_r1.ladder.images import load_rgb, store_image

    if not stored.get("bytes"):
        raise ValueError(f"the file holds no picture, only the path {stored.get('path')!r}")
    return load_rgb("picture", store_image(stored["bytes"], max_pixels).data, max_pixels)
