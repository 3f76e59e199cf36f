"""What scoring knows of a question, and what it says about a response. Plain values that JSON can hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from typing import Any


class Outcome(IntEnum):
    """What became of a question under one way of scoring. An integer, so that ranks can exchange it exactly."""

    UNANSWERED = 0
    WRONG = 1
    RIGHT = 2
    NO_CANDIDATE = 3
    """The response names no answer. It is wrong; an official scorer may guess here."""


@dataclass(frozen=True)
class Item:
    """A question as far as scoring needs it: enough to score a saved response again without the data set.

    Args:
        id: Name in the data set.
        answer: The right answer; several where any of them is right.
        question_type: As the data set names it, such as `multi_choice` or `open`.
        answer_type: As the data set names it, empty where it has none.
        choices: Texts of the options; A names the first.
        precision: Decimals of a number, as a float where the data set holds a float.
        unit: Of the answer.
        groups: The values of the question in every breakdown, such as `{"skills": ["algebraic reasoning"]}`.
    """

    id: str
    answer: str | list[str]
    question_type: str = ""
    answer_type: str = ""
    choices: list[str] = field(default_factory=list)
    precision: float | None = None
    unit: str | None = None
    groups: Mapping[str, list[str]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Item:
        return cls(**values)


@dataclass(frozen=True)
class Judgement:
    """A response under one way of scoring.

    Args:
        outcome: Right or wrong.
        prediction: What was compared with the answer: an option, a number as text, or all candidates of an open one.
    """

    outcome: Outcome
    prediction: str | list[str] | None

    @classmethod
    def of(cls, correct: bool, prediction: str | list[str] | None) -> Judgement:
        return cls(Outcome.RIGHT if correct else Outcome.WRONG, prediction)

    @property
    def is_right(self) -> bool:
        return self.outcome is Outcome.RIGHT


@dataclass(frozen=True)
class Verdict:
    """What is said about a response.

    Args:
        extraction: The text that was judged.
        strict: By the official function.
        lenient: By the official function after the answer was unwrapped.
    """

    extraction: str
    strict: Judgement
    lenient: Judgement
