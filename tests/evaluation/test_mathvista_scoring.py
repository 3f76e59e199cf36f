"""MathVista's scoring. That `strict` equals the official code is shown by benchmarks/official_scores.py."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from observe_r1.evaluation import Item, MathVista, Outcome
from observe_r1.evaluation.mathvista_scoring import official_prediction, unwrapped

OPTIONS = ["135°", "140°", "145°", "150°"]


def choice(answer: str = "145°", choices: list[str] = OPTIONS) -> Item:
    return Item("1", answer, "multi_choice", "text", choices)


def number(answer: str, precision: float | None = None, unit: str | None = None) -> Item:
    return Item("1", answer, "free_form", "integer" if precision is None else "float", [], precision, unit)


LIST = Item("1", "[2014, 2016]", "free_form", "list")


@pytest.mark.parametrize(
    ("item", "extraction", "expected"),
    [
        (choice(), "C", "145°"),
        (choice(), "(c) 145°", "145°"),
        (choice(), " C ", "145°"),
        (choice(), "c", "135°"),  # no letter for the official scorer: the nearest option, the first of equally near
        (choice(), "C.", "135°"),
        (choice(), "E", "135°"),
        (choice(), "150", "150°"),
        (choice(), "(E)", "135°"),
        (choice(), "(B) or (C)", "140°"),
        (choice(), "", "135°"),
        (choice(), None, "135°"),
        (number("14"), "14.9", "14"),
        (number("14"), "14 cm", None),
        (number("14"), "1_4", "14"),
        (number("14"), "inf", None),
        (number("14"), "nan", None),
        (number("1.2", 1.0), "1.249", "1.2"),  # the data set holds the precision as a float
        (number("1.20", 2), "1.2", "1.2"),
        (number("1.2", 1), None, None),
        (number("1.2", float("nan")), "1.2", None),
        (LIST, "[2014,2016]", "[2014,2016]"),
        (LIST, ["a"], "['a']"),
    ],
)
def test_official_predictions(item: Item, extraction: object, expected: str | None) -> None:
    assert official_prediction(extraction, item) == expected


def test_an_empty_extraction_may_pick_nothing() -> None:
    assert official_prediction("  ", choice(), ignore_empty=True) is None


@pytest.mark.parametrize(
    "item", [Item("7", "x", "multi_choice"), Item("7", "x", "free_form", "text"), Item("7", "x", "free_form", "")]
)
def test_questions_that_mathvista_does_not_have_are_refused(item: Item) -> None:
    with pytest.raises(ValueError, match=r"options|integer, float, list"):
        official_prediction("x", item)


@pytest.mark.parametrize(
    ("item", "text", "expected"),
    [
        (choice(), "c", "C"),
        (choice(), "C.", "C"),
        (choice(), "**C**", "C"),
        (choice(), "C: 145°", "C"),
        (choice(), r"\boxed{\text{(C)}}", "C"),
        (choice("No", ["Yes", "No"]), "no.", "B"),
        (choice("A", ["C", "B", "A"]), "A.", "C"),
        (choice(), "about right", "about right"),
        (number("14"), "14 cm", "14.0"),
        (number("14"), "x = 14", "14"),
        (number("1200"), "1,200 apples", "1200.0"),
        (number("1200"), "from 3 to $1,200$ at most", "1200"),
        (number("0.5", 1), "1/2", "0.5"),
        (number("0.5", 1), r"$\frac{1}{2}$", "0.5"),
        (number("-3"), "\u22123", "-3.0"),
        (number("-3"), "y is -3.", "-3"),
        (number("5"), "3-5", "5"),
        (number("5"), "Fig.5", "5"),
        (number("5"), "none", "none"),
        (number("5"), "1e999999999", "1e999999999"),
        (LIST, "[2014,2016]", "[2014, 2016]"),
        (LIST, "2014, 2016", "[2014, 2016]"),
        (LIST, "(2014, 2016)", "[2014, 2016]"),
        (LIST, "[2014, __import__('os')]", "[2014, __import__('os')]"),
        (LIST, "(" * 1999, "(" * 1999),
    ],
)
def test_unwrapping(item: Item, text: str, expected: str) -> None:
    assert unwrapped(text, item) == expected


@pytest.mark.parametrize(
    ("response", "extraction", "strict", "lenient"),
    [
        ("<observe>o</observe><think>(A)?</think><answer> C </answer>", "C", True, True),
        ("<think>x</think><answer>c.</answer>", "c.", False, True),
        ("<answer>A</answer> no, <answer>C</answer>", "C", True, True),
        ("<answer><answer>C</answer></answer>", "C", True, True),
        ("C", "C", True, True),
        ("It is (C), not (B)", "It is (C), not (B)", True, True),
        ("<answer></answer>", "", False, False),
        ("<answer>C", "<answer>C", False, False),
    ],
)
def test_the_last_answer_block_is_judged(response: str, extraction: str, strict: bool, lenient: bool) -> None:
    verdict = MathVista().judge(choice(), response)
    assert (verdict.extraction, verdict.strict.is_right, verdict.lenient.is_right) == (extraction, strict, lenient)


@given(st.text(), st.lists(st.text(), min_size=1, max_size=8))
def test_every_response_gets_an_option(response: str, options: list[str]) -> None:
    verdict = MathVista().judge(choice(options[0], options), response)
    assert verdict.strict.prediction in options
    assert verdict.strict.outcome in (Outcome.RIGHT, Outcome.WRONG)


@given(st.integers(-10_000_000, 10_000_000), st.sampled_from(["{}", "{:,}", " {} cm", "**{}**", r"$\boxed{{{}}}$"]))
def test_integers_in_any_dress_are_right_leniently(value: int, dress: str) -> None:
    response = f"<answer>{dress.format(value)}</answer>"
    assert MathVista().judge(number(str(value)), response).lenient.is_right
    assert not MathVista().judge(number(str(value + 1)), response).lenient.is_right
