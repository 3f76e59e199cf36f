"""Random responses and questions for `official_scores.py`: fragments that scorers look for, mixed with noise."""

from __future__ import annotations

import random
from typing import Any

from observe_r1.evaluation.item import Item
from observe_r1.evaluation.mmmu import DOMAIN_OF

# fmt: off
WORDS = (
    "A", "B", "C", "D", "E", "a", "b", "(A)", "(B)", "(c)", "(D)", "(AB)", "B.", "C:", "is", "so", "thus", "therefore",
    "final", "answer", "result", "could be", "Answer:", "The answer is", "=", "==", "x =", "red", "Blue", "Yes", "no",
    "135°", "12 cm", "triangle", "the", "of", "İ", "ß", "\u00b2", "\u0663", "\u4e2d", "\u200b", "\x00", "\ud800",
    "<answer>", "</answer>", "None", "nan", "inf", "-inf", "infinity", "1_000", "0x10", "[1, 2]", "(1, 2)",
)
SPACES = (" ", " ", " ", " ", "", "\n", ". ", ", ", "\t", ": ", "\r\n", "\u00a0", "...", ";", "'", " . ")
DIGITS = "0123456789"
NUMBER_PARTS = (*DIGITS, *DIGITS, ",", ",", ".", ".", "-", "e", "E", "+", " ", "%", "$", "/", "\u0665", "_")
# fmt: on


def random_mathvista(generator: random.Random) -> tuple[object, Item]:
    """An extraction, now and then no text, and a question of any type."""
    choices = [_option(generator) for _ in range(generator.choice((1, 2, 2, 3, 4, 4, 4, 5, 6, 8, 27)))]
    question_type, answer_type = generator.choice(
        (("multi_choice", "text"), ("free_form", "integer"), ("free_form", "float"), ("free_form", "list"))
    )
    precision = generator.choice((None, 0, 1, 2, 1.0, 2.0, 3.7, float("nan"), -1)) if answer_type == "float" else None
    extraction: object = _text(generator)
    if generator.random() < 0.3:
        extraction = generator.choice((*choices, *"ABCDabcd", " B ", "(B)", "(b) x", ""))
    elif generator.random() < 0.05:
        extraction = generator.choice((None, 3, 2.5, True, [1, 2], {"a": 1}, float("inf"), b"B"))
    answer = generator.choice(choices) if question_type == "multi_choice" else str(_number(generator))
    if generator.random() < 0.05:
        choices = []
    return extraction, Item("1", answer, question_type, answer_type, choices, precision)


def random_mmmu(generator: random.Random) -> tuple[str, Item]:
    """A response and a question of either type."""
    choices = [_option(generator) for _ in range(generator.choice((2, 3, 4, 4, 4, 5, 9)))]
    response = _text(generator)
    if generator.random() < 0.2:
        response += generator.choice((*choices, "is (B).", " B", "A.", "'C'", ""))
    if generator.random() < 0.5:
        letter = chr(ord("A") + generator.randrange(len(choices)))
        answer: Any = letter if generator.random() < 0.9 else [letter, "A"]
        return response, Item("validation_Art_1", answer, "multiple-choice", choices=choices)
    answer = str(_number(generator)) if generator.random() < 0.5 else generator.choice(WORDS)
    if generator.random() < 0.4 and response:  # something that occurs in the response
        start = generator.randrange(len(response))
        answer = response[start : start + generator.randrange(1, 6)]
    if generator.random() < 0.2:
        answer = [answer, generator.choice(WORDS)]
    return response, Item("validation_Art_1", answer, generator.choice(("open", "short-answer")))


def random_mmmu_row(generator: random.Random) -> dict[str, Any]:
    """A row of the data set, without its pictures."""
    choices = [_option(generator).replace("\ud800", "") for _ in range(generator.randrange(2, 7))]
    is_choice = generator.random() < 0.7
    return {
        "id": f"validation_{generator.choice(sorted(DOMAIN_OF))}_{generator.randrange(1, 31)}",
        "question": f"<image 1> {_text(generator)}",
        "options": str(choices) if is_choice else "[]",
        "answer": chr(ord("A") + generator.randrange(len(choices))) if is_choice else "7",
        "question_type": "multiple-choice" if is_choice else "open",
        "topic_difficulty": "Easy",
    }


def _text(generator: random.Random) -> str:
    parts = []
    for _ in range(generator.choice((0, 1, 1, 2, 3, 5, 8, 13, 30))):
        kind = generator.random()
        parts.append(
            generator.choice(WORDS) if kind < 0.6 else _number_like(generator) if kind < 0.9 else _noise(generator)
        )
        parts.append(generator.choice(SPACES))
    return "".join(parts)


def _number_like(generator: random.Random) -> str:
    return "".join(generator.choices(NUMBER_PARTS, k=generator.randrange(1, 14)))


def _number(generator: random.Random) -> float | int:
    return generator.choice((generator.randrange(-20, 200), round(generator.uniform(-5, 50), generator.randrange(3))))


def _noise(generator: random.Random) -> str:
    return "".join(
        chr(generator.choice((generator.randrange(32, 127), generator.randrange(1, 0x3000)))) for _ in range(6)
    )


def _option(generator: random.Random) -> str:
    kind = generator.random()
    if kind < 0.4:
        return str(_number(generator))
    return (
        " ".join(generator.choice(WORDS) for _ in range(generator.choice((0, 1, 1, 2, 4))))
        if kind < 0.9
        else _noise(generator)
    )
