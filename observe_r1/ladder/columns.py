"""Which column of a data set is the question, which the answer: presets for known data sets, and one's own mapping."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from decimal import Decimal
from typing import Any, Literal

from observe_r1.ladder.sample import BadSample

Format = Literal["auto", "release", "geometry3k", "virl39k", "mmk12", "mm_eureka"]


@dataclass(frozen=True)
class Columns:
    """The names of a data set's columns; null: as the format has it.

    `a.b` is the entry b of column a, and `a|b` the first of these columns that the row has. A row has either messages
    or a question.

    Args:
        messages: A chat: messages with role and content (or from and value), as a list or as a JSON text of one.
        question: The question as plain text; `<image>` in it marks where an image belongs.
        images: Paths, addresses or encoded images, one or a list.
        answer: The right answer.
        id: Name of the sample; rows without one are called after the file and their number.
        source: Data set that the sample comes from.
        answer_type: `auto`, `text`, `choice`, `number` or `math`.
        choices: Option texts, as a list or as a JSON text of one.
        precision: Decimals that a right number must agree in.
        unit: Unit of the answer.
        difficulty: 1 − pass rate.
        pass_rate: Pass rate, in the place of a difficulty; a negative one is unknown.
        complexity: Mean completion length in tokens.
        n_correct: Right rollouts.
        n_rollouts: Rollouts.
    """

    messages: str | None = None
    question: str | None = None
    images: str | None = None
    answer: str | None = None
    id: str | None = None
    source: str | None = None
    answer_type: str | None = None
    choices: str | None = None
    precision: str | None = None
    unit: str | None = None
    difficulty: str | None = None
    pass_rate: str | None = None
    complexity: str | None = None
    n_correct: str | None = None
    n_rollouts: str | None = None

    def over(self, other: Columns) -> Columns:
        """These columns, and those of `other` where these are null."""
        named = {name: value for name, value in vars(self).items() if value is not None}
        if self.question is not None and self.messages is None:
            named["messages"] = None
        return replace(other, **named)


_SAME_NAMES = {
    field.name: field.name for field in fields(Columns) if field.name not in ("messages", "question", "pass_rate")
}

PRESETS: dict[str, Columns] = {
    # the Observe-R1 release, and our own format: `message` is a list in a string there
    "release": Columns(**{**_SAME_NAMES, "messages": "messages|message", "images": "images|image"}),
    # MM-Eureka's JSON Lines
    "mm_eureka": Columns(**{**_SAME_NAMES, "messages": "conversations|message", "images": "image_urls|images|image"}),
    # Geometry3K as it is on the Hugging Face hub for reinforcement learning
    "geometry3k": Columns(**{**_SAME_NAMES, "question": "problem"}),
    # ViRL39K: pictures lie in an archive beside the parquet file, pass rates of two models come along
    "virl39k": Columns(
        **{**_SAME_NAMES, "question": "question", "images": "image", "id": "qid"},
        pass_rate="PassRate_7BBase|PassRate_7BUntrained",  # of the size one trains; the 32B one is a trained model's
    ),
    "mmk12": Columns(**{**_SAME_NAMES, "question": "question", "images": "image|images"}),
}


def columns_of(row: Mapping[str, Any], format: Format, own: Columns) -> Columns:
    """The columns of a row: those the user named, then those of the format, which `auto` reads off the row.

    Raises:
        BadSample: `field_missing`, when nothing in the row looks like a question.
    """
    if format != "auto":
        return own.over(PRESETS[format])
    if own.question is not None or own.messages is not None:
        return own.over(Columns(**_SAME_NAMES))
    if "messages" in row or "message" in row:
        preset = "release"
    elif "conversations" in row:
        preset = "mm_eureka"
    elif "problem" in row:
        preset = "geometry3k"
    elif "question" in row:
        preset = "virl39k" if "qid" in row else "mmk12"
    else:
        raise BadSample(
            "field_missing", f"no message and no question among {_names(row)}; name them with --columns.question …"
        )
    return own.over(PRESETS[preset])


def release_row(row: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    """The row under the names of the release's format, its question as messages.

    Raises:
        BadSample: The row has no question, a list in a text that cannot be parsed, or a pass rate that is none.
    """
    values = {name: _look_up(row, path) for name, path in vars(columns).items() if path is not None}
    messages, question = values.pop("messages", None), values.pop("question", None)
    if messages is None and question is None:
        wanted = columns.messages or columns.question
        raise BadSample("field_missing", f"{wanted}: the row has {_names(row)}")
    values["messages"] = [{"role": "user", "content": question}] if messages is None else messages
    for name in ("choices", "images"):
        text = values.get(name)
        if isinstance(text, str) and text.lstrip().startswith("["):
            values[name] = _list(name, text)
    rate = values.pop("pass_rate", None)
    rate = float(rate) if isinstance(rate, Decimal) else rate
    if values.get("difficulty") is None and rate is not None:
        if not isinstance(rate, (int, float)) or isinstance(rate, bool) or rate > 1:
            raise BadSample("field_invalid", f"the pass rate is {rate!r:.80}, not a number up to 1")
        values["difficulty"] = None if rate < 0 else 1 - rate
    return values


def _look_up(row: Mapping[str, Any], path: str) -> Any:
    for name in path.split("|"):
        value: Any = row.get(name)
        if value is None and "." in name:
            value = row
            for part in name.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None and not (isinstance(value, float) and math.isnan(value)):
            return value
    return None


def _list(name: str, text: str) -> list[Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise BadSample("field_invalid", f"{name} is neither a list nor the JSON text of one: {text:.80}") from error
    assert isinstance(value, list)
    return value


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(map(str, row)) or "no columns"
