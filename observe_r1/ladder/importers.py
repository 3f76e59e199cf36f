"""Rows of the Observe-R1 release's format, JSON or JSON Lines, to samples.

A row has `message` (or `messages`), a chat as a list or as that list in a JSON string; `answer`; and where known `id`,
`source`, `answer_type`, `choices`, `precision`, `unit`, `difficulty`, `complexity`, `n_correct`, `n_rollouts`. Images
are items `{"type": "image", "image": …}` of a message, or stand in the column `images` (or `image`) of the row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from observe_r1.ladder.addresses import read_image
from observe_r1.ladder.images import DEFAULT_MAX_PIXELS, StoredImage, store_image
from observe_r1.ladder.sample import BadSample, Sample, parse_json

MARKER = re.compile(r"<image>")  # where an image belongs in a text, in data sets that keep images apart
COPIED = ("answer_type", "choices", "precision", "unit", "difficulty", "complexity", "n_correct", "n_rollouts")


def read_rows(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """The rows of a JSON list or of JSON Lines, numbered from 1 (JSON Lines: the line's number).

    A line that is not JSON comes as the `BadSample` that says so. JSON Lines are read line by line, a list as a whole.

    Raises:
        ValueError: The file holds a JSON list that cannot be parsed.
    """
    if _starts_with_bracket(file):
        try:
            yield from enumerate(json.load(file), start=1)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"the input starts as a JSON list but cannot be parsed ({error}); repair the file"
            ) from error
        return
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                yield number, parse_json(line)
            except BadSample as bad:
                yield number, bad


def sample_of(
    row: object,
    default_id: str,
    directory: Path,
    *,
    image_root: Path | None = None,
    system_prompt: str | None = None,
    max_image_pixels: int = DEFAULT_MAX_PIXELS,
) -> Sample[StoredImage]:
    """The sample that a row describes.

    Args:
        row: As `read_rows` gives it.
        default_id: The sample's id if the row has none.
        directory: Where the input lies, for relative image paths.
        image_root: Where the images lie.
        system_prompt: Takes the place of the row's system message.
        max_image_pixels: Largest width × height of an image.

    Raises:
        BadSample: The row is not usable.
    """
    if isinstance(row, BadSample):
        raise row
    if not isinstance(row, Mapping):
        raise BadSample("json_invalid", f"a row is a JSON object, this is {type(row).__name__}")
    messages, references = _place_images(_messages(row), _column_images(row))
    if system_prompt is not None:
        messages = [message for message in messages if message.get("role") != "system"]
        messages.insert(0, {"role": "system", "content": system_prompt})
    document = {name: row.get(name) for name in COPIED}
    document |= {"messages": messages, "id": _plain(row.get("id"), default_id), "source": _plain(row.get("source"), "")}
    document["answer"] = _plain(row.get("answer"), None)
    if document["difficulty"] is None and document["n_rollouts"] and isinstance(document["n_correct"], int):
        document["difficulty"] = 1 - document["n_correct"] / document["n_rollouts"]
    # Texts, numbers and the gold are checked before any image is fetched.
    Sample.from_document(document, references)
    images = [store_image(read_image(reference, directory, image_root), max_image_pixels) for reference in references]
    return Sample.from_document(document, images)


def _starts_with_bracket(file: BinaryIO) -> bool:
    """Whether the first character that is not white space is `[`; leaves the file at its start."""
    first = b""
    while (byte := file.read(1)) and not first:
        first = byte.strip(b" \t\r\n\xef\xbb\xbf")
    file.seek(0)
    return first == b"["


def _messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages = row.get("messages", row.get("message"))
    if messages is None:
        raise BadSample("field_missing", "message")
    if isinstance(messages, str):
        messages = parse_json(messages)
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadSample("messages_invalid", f"not a list of chat messages: {messages!r:.80}")
    return messages


def _column_images(row: Mapping[str, Any]) -> list[str]:
    images = row.get("images", row.get("image"))
    if images is None:
        return []
    return [_reference(image) for image in (images if isinstance(images, list) else [images])]


def _reference(image: object) -> str:
    """The path or address in an image item: a text, or one level down, as in `{"url": …}`."""
    if isinstance(image, Mapping):
        image = next((image[name] for name in ("image", "image_url", "url", "path") if image.get(name)), None)
        return _reference(image) if isinstance(image, (str, Mapping)) else _reference(None)
    if not isinstance(image, str) or not image.strip():
        raise BadSample("messages_invalid", f"an image is a path, an address or a data URL, not {image!r:.80}")
    return image


def _place_images(messages: Sequence[dict[str, Any]], column: list[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """The messages with image items that hold indices, and the image references in the order of those indices.

    Where the texts of a message have markers, they say where its images belong. Images of the row's column go to
    the first user message, ahead of its own.
    """
    placed: list[dict[str, Any]] = []
    references: list[str] = []
    for message in messages:
        items = message.get("content")
        if isinstance(items, str):
            items = [{"type": "text", "text": items}]
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise BadSample("messages_invalid", f"content is neither text nor a list of items: {message!r:.80}")
        if message.get("role") == "user" and column:
            items, column = [{"type": "image", "image": image} for image in column] + items, []
        content: list[dict[str, Any]] = []
        for item in _at_markers(items):
            if item.get("type") in ("image", "image_url"):
                content.append({"type": "image", "index": len(references)})
                references.append(_reference(item))
            else:
                content.append(item)
        placed.append({"role": message.get("role"), "content": content})
    if column:
        raise BadSample("image_count_mismatch", f"{len(column)} images in the row, no user message to show them in")
    return placed, references


def _at_markers(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    texts = [item["text"] if isinstance(item.get("text"), str) else "" for item in items]
    markers = sum(len(MARKER.findall(text)) for text in texts)
    if not markers:
        return items
    images = [item for item in items if item.get("type") in ("image", "image_url")]
    if len(images) != markers:
        raise BadSample("image_count_mismatch", f"{markers} times {MARKER.pattern} in the text, {len(images)} images")
    remaining = iter(images)
    content: list[dict[str, Any]] = []
    for text in texts:
        for number, piece in enumerate(MARKER.split(text)):
            if number:
                content.append(next(remaining))
            if piece.strip():
                content.append({"type": "text", "text": piece})
    return content


def _plain(value: object, default: str | None) -> object:
    """Identifiers and answers may come as numbers; anything else is left for validation to refuse."""
    if value is None:
        return default
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value
