"""Rows of the Observe-R1 release's format to samples; `columns` brings other formats into this form.

A row has `message` (or `messages`), a chat as a list or as that list in a JSON string; `answer`; and where known `id`,
`source`, `answer_type`, `choices`, `precision`, `unit`, `difficulty`, `complexity`, `n_correct`, `n_rollouts`. Images
are items `{"type": "image", "image": …}` of a message, or stand in the column `images` of the row: as paths, addresses,
or encoded, as `{"bytes": …}` or bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from observe_r1.ladder.addresses import read_image
from observe_r1.ladder.columns import Columns, Format, columns_of, release_row
from observe_r1.ladder.images import DEFAULT_MAX_PIXELS, StoredImage, store_image
from observe_r1.ladder.sample import BadSample, Sample, parse_json

Reference = str | bytes  # a path or an address, or the encoded image itself
MARKER = "<image>"  # where an image belongs in a text, in data sets that keep images apart
REFERENCES = ("image", "image_url", "url", "path")  # keys of an image item that hold its path or address
SPEAKERS = {"human": "user", "gpt": "assistant"}
COPIED = ("answer_type", "choices", "precision", "unit", "difficulty", "complexity", "n_correct", "n_rollouts")


def sample_of(
    row: object,
    default_id: str,
    directories: Sequence[Path],
    *,
    format: Format = "auto",
    columns: Columns = Columns(),
    source: str = "",
    image_root: Path | None = None,
    system_prompt: str | None = None,
    max_image_pixels: int = DEFAULT_MAX_PIXELS,
) -> Sample[StoredImage]:
    """The sample that a row describes.

    Args:
        row: The content of a table's row.
        default_id: The sample's id if the row has none.
        directories: Where the input lies, for relative image paths.
        format: Of the row.
        columns: Those that are not as the format has them.
        source: Of rows that name none.
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
    row = release_row(row, columns_of(row, format, columns))
    messages, references = _place_images(_messages(row), _column_images(row))
    if system_prompt is not None:
        messages = [message for message in messages if message.get("role") != "system"]
        messages.insert(0, {"role": "system", "content": system_prompt})
    document = {name: row.get(name) for name in COPIED}
    document |= {
        "messages": messages,
        "id": _plain(row.get("id"), default_id),
        "source": _plain(row.get("source"), source),
    }
    document["answer"] = _plain(row.get("answer"), None)
    # Texts, numbers and the gold are checked before any image is fetched.
    checked = Sample.from_document(document, references)
    if checked.difficulty is None and checked.n_rollouts and checked.n_correct is not None:
        document["difficulty"] = 1 - checked.n_correct / checked.n_rollouts
    images = [
        store_image(
            reference if isinstance(reference, bytes) else read_image(reference, directories, image_root),
            max_image_pixels,
        )
        for reference in references
    ]
    return Sample.from_document(document, images)


def _messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages = row["messages"]
    if isinstance(messages, str):
        messages = parse_json(messages)
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadSample("messages_invalid", f"not a list of chat messages: {messages!r:.80}")
    return [_with_role(message) for message in messages]


def _with_role(message: dict[str, Any]) -> dict[str, Any]:
    """A message of `from` and `value`, as conversations of supervised sets have them, with role and content."""
    if "role" in message or "from" not in message:
        return message
    speaker = message["from"]
    role = SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker
    return {"role": role, "content": message.get("value")}


def _column_images(row: Mapping[str, Any]) -> list[Reference]:
    images = row.get("images")
    if images is None:
        return []
    return [_reference(image) for image in (images if isinstance(images, list) else [images])]


def _reference(image: object) -> Reference:
    """The path, address or content of an image: itself, or a level further down, as in `{"image_url": {"url": …}}`."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, Mapping):
        content = image.get("bytes")
        if isinstance(content, bytes):
            return content
        image = next((image[name] for name in REFERENCES if image.get(name)), None)
        return _reference(image) if isinstance(image, (str, bytes, Mapping)) else _reference(None)
    if not isinstance(image, str) or not image.strip():
        raise BadSample("messages_invalid", f"an image is a path, an address or a data URL, not {image!r:.80}")
    return image


def _place_images(
    messages: Sequence[dict[str, Any]], column: list[Reference]
) -> tuple[list[dict[str, Any]], list[Reference]]:
    """The messages with image items that hold indices, and the image references in the order of those indices.

    Images of the row's column fill, in order, the image items without a reference and the markers in the texts. Where
    there are neither, they go to the first user message, ahead of what it holds. A column that only repeats the
    references of the messages is left out.
    """
    contents = [_items(message) for message in messages]
    inline = [_reference(item) for items in contents for item in items if _is_image(item) and _refers(item)]
    remaining = deque([] if column == inline else column)
    if not any(_wants_image(item) for items in contents for item in items):
        for message, items in zip(messages, contents, strict=True):
            if message.get("role") == "user":
                items[:0] = [{"type": "image", "image": image} for image in remaining]
                remaining.clear()
                break
    placed: list[dict[str, Any]] = []
    references: list[Reference] = []
    for message, items in zip(messages, contents, strict=True):
        content: list[dict[str, Any]] = []
        for item in _at_markers([_filled(item, remaining) for item in items], remaining):
            if _is_image(item):
                content.append({"type": "image", "index": len(references)})
                references.append(_reference(item))
            else:
                content.append(item)
        placed.append({"role": message.get("role"), "content": content})
    if remaining:
        raise BadSample("image_count_mismatch", f"{len(remaining)} images of the row have no place in the messages")
    return placed, references


def _items(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
        raise BadSample("messages_invalid", f"content is neither text nor a list of items: {message!r:.80}")
    return list(content)


def _is_image(item: Mapping[str, Any]) -> bool:
    return item.get("type") in ("image", "image_url")


def _refers(item: Mapping[str, Any]) -> bool:
    return any(item.get(name) is not None for name in REFERENCES)


def _wants_image(item: Mapping[str, Any]) -> bool:
    return (_is_image(item) and not _refers(item)) or _markers(item) > 0


def _markers(item: Mapping[str, Any]) -> int:
    text = item.get("text")
    return text.count(MARKER) if isinstance(text, str) else 0


def _filled(item: dict[str, Any], remaining: deque[Reference]) -> dict[str, Any]:
    if not _is_image(item) or _refers(item):
        return item
    if not remaining:
        raise BadSample("image_count_mismatch", "an image item without a path, and no image of the row left for it")
    return {"type": "image", "image": remaining.popleft()}


def _at_markers(items: list[dict[str, Any]], remaining: deque[Reference]) -> list[dict[str, Any]]:
    """The items with the images of the message, then those of the row, where its markers want them."""
    markers = sum(map(_markers, items))
    if not markers:
        return items
    images = deque(item for item in items if _is_image(item))
    while len(images) < markers and remaining:
        images.append({"type": "image", "image": remaining.popleft()})
    if len(images) != markers:
        raise BadSample("image_count_mismatch", f"{markers} times {MARKER} in the text, {len(images)} images")
    content: list[dict[str, Any]] = []
    for item in items:
        if _is_image(item):
            continue
        if not _markers(item):
            content.append(item)
            continue
        for number, piece in enumerate(item["text"].split(MARKER)):
            if number:
                content.append(images.popleft())
            if piece.strip():
                content.append({"type": "text", "text": piece})
    return content


def _plain(value: object, default: str | None) -> object:
    """Identifiers and answers may come as numbers; anything else is left for validation to refuse."""
    if value is None:
        return default
    return str(value) if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool) else value
