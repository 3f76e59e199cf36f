"""One sample of a ladder: what its JSON member may hold, and the named reason for which a sample is refused."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Generic, Literal, TypeVar

from PIL import Image

from observe_r1.answers import AnswerType, Gold, check_gold
from observe_r1.experience import Message, Prompt

Reason = Literal[
    "control_token_in_text",  # the text holds a token with which a chat template marks turns or images
    "difficulty_missing",  # no difficulty, in a data set whose other samples have one
    "empty_question",  # no user message holds text
    "field_invalid",
    "field_missing",
    "gold_unparseable",  # no completion could be judged against this gold answer
    "id_duplicate",
    "image_corrupt",
    "image_count_mismatch",  # image items of the messages against images
    "image_missing",  # a file or an address that cannot be read
    "image_too_large",
    "image_unsupported",  # a format or a pixel type that RGB cannot hold
    "json_invalid",
    "json_missing",
    "key_with_dots",  # a key ends at the first dot of a name, so several samples have become one
    "member_duplicate",
    "messages_invalid",
    "shard_changed",  # its bytes are not those that were indexed: damaged, or replaced
    "shard_corrupt",
    "shard_duplicate",  # the same bytes as another shard of the ladder
    "shard_missing",
    "shard_truncated",
    "shard_unreachable",  # the server fails, refuses or does not answer
]


class BadSample(ValueError):
    """A sample that cannot be used: `reason` is a name to count by, `detail` says what exactly is wrong."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason: Reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[BadSample], tuple[Reason, str]]:
        return BadSample, (self.reason, self.detail)


ROLES = ("system", "user", "assistant")
CONTROL_TOKEN = re.compile(
    r"<\|(?:im_start|im_end|endoftext|vision_start|vision_end|vision_pad|image_pad|video_pad)\|>"
)

ImageT = TypeVar("ImageT")


@dataclass(frozen=True)
class Sample(Generic[ImageT]):
    """A question with its answer, its images (encoded or decoded) and what was measured about it.

    Constructing one validates it. Image items of `messages` are `{"type": "image", "index": i}`; read in order, their
    indices are 0, 1, 2, …, one for each image.

    Raises:
        BadSample: A field has the wrong type or range, the question is empty, images and image items do not match, or
            the gold answer could not be judged.
    """

    id: str
    messages: Sequence[Message]
    answer: str
    images: Sequence[ImageT] = field(default=(), repr=False)
    source: str = ""
    answer_type: AnswerType = "auto"
    choices: tuple[str, ...] = ()
    precision: int | None = None
    unit: str | None = None
    difficulty: float | None = None
    n_correct: int | None = None
    n_rollouts: int | None = None
    complexity: float | None = None
    stage: float | None = None

    def __post_init__(self) -> None:
        if not _text(self.id, "id"):
            raise BadSample("field_invalid", "id is empty")
        _text(self.source, "source")
        _check_messages(self.messages, len(self.images))
        _check_measurements(self)
        if reason := check_gold(self.gold):
            raise BadSample("gold_unparseable", reason)

    @cached_property
    def gold(self) -> Gold:
        """The answer as the rewards judge it."""
        _text(self.answer, "answer")
        if not isinstance(self.choices, tuple):
            raise BadSample("field_invalid", f"choices is {_kind(self.choices)}, not a list of texts")
        for choice in self.choices:
            _text(choice, "choices")
        _integer(self.precision, "precision")
        if self.unit is not None:
            _text(self.unit, "unit")
        try:
            return Gold(self.answer, self.answer_type, self.choices, self.precision, self.unit)
        except ValueError as error:
            raise BadSample("gold_unparseable", str(error)) from error

    @classmethod
    def from_document(cls, document: object, images: Sequence[ImageT]) -> Sample[ImageT]:
        """A sample from its parsed JSON. Keys that the schema does not know are ignored, `null` means absent.

        Raises:
            BadSample: The document does not follow the schema.
        """
        if not isinstance(document, Mapping):
            raise BadSample("json_invalid", f"a sample is a JSON object, this is {_kind(document)}")
        values = {name: document[name] for name in _DOCUMENT_FIELDS if document.get(name) is not None}
        if missing := [name for name in ("id", "messages", "answer") if name not in values]:
            raise BadSample("field_missing", ", ".join(missing))
        if isinstance(values.get("choices"), list):
            values["choices"] = tuple(values["choices"])
        for name in ("precision", "n_correct", "n_rollouts"):  # float64 in MathVista, and in any column with gaps
            if isinstance(number := values.get(name), float) and number.is_integer():
                values[name] = int(number)
        return cls(images=images, **values)

    def to_document(self) -> dict[str, Any]:
        """The JSON member; absent values are left out."""
        document = {name: getattr(self, name) for name in _DOCUMENT_FIELDS}
        return {name: value for name, value in document.items() if value is not None and value != ()}


def from_prompt(prompt: Prompt, images: Sequence[ImageT]) -> Sample[ImageT]:
    """The sample of a prompt, with its images in another form; the position is not part of a sample.

    Raises:
        BadSample: The prompt does not follow the schema.
    """
    gold = prompt.gold
    return Sample(
        id=prompt.id,
        messages=prompt.messages,
        answer=gold.answer,
        images=images,
        source=prompt.source,
        answer_type=gold.answer_type,
        choices=gold.choices,
        precision=gold.precision,
        unit=gold.unit,
        difficulty=prompt.difficulty,
        n_correct=prompt.n_correct,
        n_rollouts=prompt.n_rollouts,
        complexity=prompt.complexity,
        stage=prompt.stage,
    )


def to_prompt(sample: Sample[Image.Image], position: int) -> Prompt:
    """The sample as the trainer reads it, at its position in the ladder."""
    return Prompt(
        id=sample.id,
        source=sample.source,
        messages=sample.messages,
        images=sample.images,
        gold=sample.gold,
        position=position,
        difficulty=sample.difficulty,
        complexity=sample.complexity,
        n_correct=sample.n_correct,
        n_rollouts=sample.n_rollouts,
        stage=sample.stage,
    )


def parse_json(data: bytes | str) -> Any:
    """Parsed JSON.

    Raises:
        BadSample: `json_invalid`, also for bytes that are not Unicode and for nesting deeper than the parser follows.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample("json_invalid", str(error)) from error


_DOCUMENT_FIELDS = tuple(item.name for item in fields(Sample) if item.name != "images")


def _kind(value: object) -> str:
    return type(value).__name__


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise BadSample("field_invalid", f"{name} is {_kind(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # a lone surrogate, which JSON escapes can smuggle in
        raise BadSample("field_invalid", f"{name} is not valid Unicode: {error}") from error
    return value


def _integer(value: object, name: str) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise BadSample("field_invalid", f"{name} is {value!r}, not a whole number of at least 0")


def _check_measurements(sample: Sample[Any]) -> None:
    for name, highest in (("difficulty", 1.0), ("stage", 1.0), ("complexity", sys.float_info.max)):
        value = getattr(sample, name)
        if value is None:
            continue
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise BadSample("field_invalid", f"{name} is {_kind(value)}, not a number")
        if not 0 <= value <= highest:
            raise BadSample("field_invalid", f"{name} is {value}, outside 0 … {highest}")
    _integer(sample.n_correct, "n_correct")
    _integer(sample.n_rollouts, "n_rollouts")
    if sample.n_correct is not None and sample.n_rollouts is not None and sample.n_correct > sample.n_rollouts:
        raise BadSample("field_invalid", f"n_correct {sample.n_correct} exceeds n_rollouts {sample.n_rollouts}")


def _check_messages(messages: object, n_images: int) -> None:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise BadSample(
            "messages_invalid", f"messages is not a list of chat messages with at least one: {messages!r:.80}"
        )
    indices: list[object] = []
    question = False
    for message in messages:
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise BadSample("messages_invalid", f"not a message with a role of {', '.join(ROLES)}: {message!r:.80}")
        for item in _content_items(message.get("content")):
            if item["type"] == "image":
                indices.append(item.get("index"))
                continue
            text = _text(item.get("text"), "text of a message")
            if token := CONTROL_TOKEN.search(text):
                raise BadSample("control_token_in_text", token.group())
            question |= message["role"] == "user" and bool(text.strip())
    if messages[-1]["role"] != "user":
        raise BadSample("messages_invalid", f"the last message is the {messages[-1]['role']}'s, not the user's")
    if len(indices) != n_images:
        raise BadSample("image_count_mismatch", f"{len(indices)} image items in the messages, {n_images} images")
    if indices != list(range(n_images)):
        raise BadSample("messages_invalid", f"image items have the indices {indices}, not {list(range(n_images))}")
    if not question:
        raise BadSample("empty_question", "no user message holds text")


def _content_items(content: object) -> Sequence[Mapping[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, (list, tuple)):
        raise BadSample("messages_invalid", f"content is {_kind(content)}, not text or a list of items")
    for item in content:
        if not isinstance(item, Mapping) or item.get("type") not in ("text", "image"):
            raise BadSample("messages_invalid", f"not an item of type text or image: {item!r:.80}")
    return content
