"""Responses of a megabyte that are made to be slow: the test run's own time limit is the bound, and a far one."""

from __future__ import annotations

import pytest

from observe_r1.evaluation import MMMU, Benchmark, Item, MathVista

MEGABYTE = 1_000_000
OPTIONS = [chr(ord("a") + number) * 40 for number in range(8)]
HOSTILE = {
    "no tags": "so the answer is ",
    "digits": "1",  # quadratic for patterns that may begin at any digit
    "groups": "111,",
    "exponents": "1.1e",
    "decimals": "1.",
    "lines": "so x\n",
    "tags": "<answer>",
    "nested": "<answer></think><answer>",
    "NUL": "\x00",
    "scripts": "Ж中ا\u0663é𝟙İ",
    "boxes": "\\boxed{",
    "stars": "**",
    "letters": "(A) B ",
}
QUESTIONS: list[tuple[Benchmark, Item]] = [
    (MathVista(), Item("1", OPTIONS[0], "multi_choice", "text", OPTIONS)),
    (MathVista(), Item("1", "3", "free_form", "integer")),
    (MathVista(), Item("1", "3.0", "free_form", "float", precision=1.0)),
    (MathVista(), Item("1", "[3]", "free_form", "list")),
    (MMMU(), Item("validation_Art_1", "A", "multiple-choice", choices=OPTIONS)),
    (MMMU(), Item("validation_Art_1", "3", "open")),
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_responses_are_scored_in_bounded_time(name: str) -> None:
    text = HOSTILE[name] * (MEGABYTE // len(HOSTILE[name]))
    for benchmark, item in QUESTIONS:
        for response in (text, f"<answer>{text}</answer>", text[:1990]):
            benchmark.judge(item, response)
