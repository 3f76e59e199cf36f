"""Questions about scenes, in families of growing difficulty, and the response a careful reader gives.

A family is two functions: one composes a scene and asks about it, the other answers from *what was seen*. The gold
answer is the answer of a reader who sees every shape; the careless annotator of `annotations.py` answers through the
same function from fewer or misread shapes, so a wrong response is wrong in a consistent way.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from observe_r1.answers import Gold
from observe_r1.experience import Message, Prompt
from observe_r1.quickstart.scenes import COLORS, KINDS, Shape, Size, paint, place

Split = Literal["train", "held_out", "warm_start"]

SYSTEM_PROMPT = "Observe, think, answer."
SMALL_SHARE = 0.3  # of the shapes: the small ones are what the warm-started policy gets wrong
MAX_COUNT = 4  # shapes of one colour
MAX_DISTRACTORS = 2
NUMBER_WORDS = ("zero", "one", "two", "three", "four")  # one token each, right after the word that is counted


@dataclass(frozen=True, slots=True)
class Response:
    """What a reader says about a scene; `text` is the project's response format."""

    observe: str
    think: str
    answer: str

    @property
    def text(self) -> str:
        return f"<observe> {self.observe}</observe><think> {self.think}</think><answer>{self.answer}</answer>"


@dataclass(frozen=True, slots=True)
class Question:
    """A question about the shapes of one scene."""

    id: str
    family: str
    text: str
    shapes: tuple[Shape, ...]
    about: tuple[str, ...]  # the kinds or colours it names
    target: int | None = None  # index of the shape it singles out; None where it counts

    def answer_from(self, seen: Sequence[Shape]) -> Response:
        """The response of a reader who saw these shapes."""
        return FAMILIES[self.family].answer(self, seen)

    @property
    def response(self) -> Response:
        return self.answer_from(self.shapes)

    def prompt(self) -> Prompt:
        """The question with its picture and gold answer, as the ladder stores it."""
        answer = self.response.answer
        content: list[Mapping[str, Any]] = [{"type": "image", "index": 0}, {"type": "text", "text": self.text}]
        messages: list[Message] = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": content}]
        gold = Gold(answer, "number" if answer.isdigit() else "text")
        return Prompt(self.id, f"quickstart/{self.family}", messages, [paint(self.shapes)], gold)


@dataclass(frozen=True, slots=True)
class Family:
    compose: Callable[[str, random.Random], Question]
    answer: Callable[[Question, Sequence[Shape]], Response]


def _size(rng: random.Random) -> Size:
    return "small" if rng.random() < SMALL_SHARE else "large"


def _single(family: str, ask: Callable[[str, str], tuple[str, str]]) -> Callable[[str, random.Random], Question]:
    """A scene of two to four shapes that share neither kind nor colour, and a question that singles one out."""

    def compose(id: str, rng: random.Random) -> Question:
        number = rng.randint(2, 4)
        kinds, colors = rng.sample(KINDS, number), rng.sample(list(COLORS), number)
        shapes = place([(kind, color, _size(rng)) for kind, color in zip(kinds, colors, strict=True)], rng)
        target = rng.randrange(number)
        text, about = ask(shapes[target].kind, shapes[target].color)
        return Question(id, family, text, shapes, (about,), target)

    return compose


def _groups(family: str, n_colors: int, ask: Callable[..., str]) -> Callable[[str, random.Random], Question]:
    """A scene with one to `MAX_COUNT` shapes of each colour asked for, and up to `MAX_DISTRACTORS` of other colours."""

    def compose(id: str, rng: random.Random) -> Question:
        colors = rng.sample(list(COLORS), n_colors)
        others = [color for color in COLORS if color not in colors]
        painted = [color for color in colors for _ in range(rng.randint(1, MAX_COUNT))]
        painted += [rng.choice(others) for _ in range(rng.randint(0, MAX_DISTRACTORS))]
        shapes = place([(rng.choice(KINDS), color, _size(rng)) for color in painted], rng)
        return Question(id, family, ask(*colors), shapes, tuple(colors))

    return compose


def _counts(question: Question, seen: Sequence[Shape]) -> list[int]:
    return [sum(shape.color == color for shape in seen) for color in question.about]


def _answer_color(question: Question, seen: Sequence[Shape]) -> Response:
    shape = seen[_target(question)]
    return Response(f"{shape.kind} {shape.color}", f"{shape.kind} is {shape.color}", shape.color)


def _answer_kind(question: Question, seen: Sequence[Shape]) -> Response:
    shape = seen[_target(question)]
    return Response(f"{shape.color} {shape.kind}", f"{shape.color} is {shape.kind}", shape.kind)


def _target(question: Question) -> int:
    assert question.target is not None
    return question.target


def _answer_count(question: Question, seen: Sequence[Shape]) -> Response:
    (count,) = _counts(question, seen)
    return Response(f"{question.about[0]} {NUMBER_WORDS[count]}", f"count {count}", str(count))


def _answer_compare(question: Question, seen: Sequence[Shape]) -> Response:
    first, second = _counts(question, seen)
    sign = "=" if first == second else ">" if first > second else "<"
    answer = {"=": "equal", ">": question.about[0], "<": question.about[1]}[sign]
    return Response(_observed(question, first, second), f"{first}{sign}{second}", answer)


def _answer_sum(question: Question, seen: Sequence[Shape]) -> Response:
    first, second = _counts(question, seen)
    return Response(_observed(question, first, second), f"{first}+{second}={first + second}", str(first + second))


def _answer_difference(question: Question, seen: Sequence[Shape]) -> Response:
    first, second = sorted(_counts(question, seen), reverse=True)
    difference = first - second
    return Response(_observed(question, *_counts(question, seen)), f"{first}-{second}={difference}", str(difference))


def _observed(question: Question, first: int, second: int) -> str:
    return f"{question.about[0]} {NUMBER_WORDS[first]}, {question.about[1]} {NUMBER_WORDS[second]}"


FAMILIES: dict[str, Family] = {
    "color": Family(_single("color", lambda kind, color: (f"What color is the {kind}?", kind)), _answer_color),
    "kind": Family(_single("kind", lambda kind, color: (f"What shape is {color}?", color)), _answer_kind),
    "count": Family(_groups("count", 1, lambda color: f"How many shapes are {color}?"), _answer_count),
    "compare": Family(_groups("compare", 2, lambda a, b: f"Are more shapes {a} or {b}?"), _answer_compare),
    "sum": Family(_groups("sum", 2, lambda a, b: f"How many shapes are {a} or {b}?"), _answer_sum),
    "difference": Family(
        _groups("difference", 2, lambda a, b: f"How far apart are the counts of {a} and {b}?"), _answer_difference
    ),
}


def make_question(split: Split, seed: int, index: int) -> Question:
    """Question `index` of a split; the families take turns. The same arguments give the same question everywhere."""
    if index < 0:
        raise ValueError(f"question index {index} is negative: count from 0")
    family = list(FAMILIES)[index % len(FAMILIES)]
    id = f"{split}-{seed}-{index}"
    return FAMILIES[family].compose(id, random.Random(id))  # a string seed is hashed the same way on every machine
