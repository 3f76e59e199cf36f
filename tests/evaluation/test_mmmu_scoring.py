"""MMMU's scoring. That `strict` equals the official code is shown by benchmarks/official_scores.py."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from observe_r1.evaluation import MMMU, Item, Outcome
from observe_r1.evaluation.mmmu_scoring import (
    guesses,
    is_right_open,
    judge_leniently,
    judge_strictly,
    named_letter,
    normal_forms,
    open_candidates,
)

OPTIONS = ["Aurelia", "Matilda", "Hermione", "Juno"]


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("(B) Matilda", "B"),
        ("B: Matilda", None),  # `B:` stands between no spaces
        ("b", None),
        ("(A) is wrong, (C) is right", "C"),
        ("(C) is right, (A) and D are wrong", "A"),
        ("A or B or A", "A"),
        ("it must be hermione, I think so", "C"),
        ("it is hermione", None),  # five words or fewer: option texts are not looked for
        ("neither juno nor aurelia, hence it is matilda", "B"),
        ("", None),
        (".'B'.", "B"),
        ("'.B.'", None),  # each sign is stripped once, the quotes last
    ],
)
def test_letters(response: str, expected: str | None) -> None:
    assert named_letter(response, OPTIONS) == expected


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("30", "30", True),
        ("30.001", "30", True),  # numbers are rounded to two decimals
        ("the answer is 1,234.5", "1234.5", True),
        ("so x = 3\nthus y = 4", "3", True),  # the tail after `so`
        ("x = 3\nthus y = 4", "3", False),  # an equation counts in the last line only
        ("1e3", "1000", True),
        ("blue whale", "whale", True),
        ("a", "a", True),
        ("banana", "a", False),  # one character needs a space beside it
        ("$6,000", "$6,000", True),
        ("6000", "$6,000", False),
        ("nan", "nan", False),
        ("The result is:", ":", False),
    ],
)
def test_open_answers(response: str, answer: str, right: bool) -> None:
    assert is_right_open(answer, open_candidates(response)) is right


def test_any_of_several_answers_is_right() -> None:
    item = Item("validation_Math_1", ["6000", "$6,000"], "open")
    assert judge_strictly("the answer is 6000", item).is_right
    assert judge_strictly("$6,000", item).is_right
    assert not judge_strictly("7000", item).is_right


@pytest.mark.parametrize("text", ["-0", "1,0,0", " 7 ", "infinity", "x", "Ä", "ABC", ""])
def test_normal_forms_are_stable(text: str) -> None:
    for form in normal_forms(text):
        assert form == form.lower() if isinstance(form, str) else form == round(form, 2)


def plain_repr(form: str | float) -> str:
    """-0 and 0 are the same answer."""
    return repr(form if isinstance(form, str) else form + 0.0)


@given(st.text(alphabet="0123456789,.eE+- a\u0663", max_size=80))
def test_numbers_are_found_as_by_plain_patterns(text: str) -> None:
    """Against patterns that may begin anywhere and give back digits, of which ours are the linear form."""
    found = {plain_repr(form) for form in open_candidates(f"is {text}")}
    whole = f"is {text}".strip().strip(".").lower()
    tail = whole.rpartition("is ")[2].strip() or whole
    grouped = re.findall(r"-?\b\d{1,3}(?:,\d{3})+\b", tail)
    powers = re.findall(r"-?\d+(?:\.\d+)?e[+-]?\d+", tail)
    plain = re.findall(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?!e[+-]?\d)(?![,\d])", tail)
    expected = {plain_repr(form) for number in (*grouped, *powers, *plain) for form in normal_forms(number)}
    assert expected <= found
    assert len(found - expected) <= 2  # the tail itself, twice if it is one character


@pytest.mark.parametrize(
    ("response", "expected"),
    [("b", "B"), ("B: Matilda", "B"), ("matilda", "B"), (r"\boxed{B}", "B"), ("B.", "B"), ("E", None), ("", None)],
)
def test_lenient_letters(response: str, expected: str | None) -> None:
    item = Item("validation_Art_1", "B", "multiple-choice", choices=OPTIONS)
    assert judge_leniently(response, item).prediction == expected


@pytest.mark.parametrize(
    ("response", "answer"), [("1/2", "0.5"), (r"$\frac{1}{4}$", "0.25"), (r"\text{Whale}", "whale")]
)
def test_lenient_open_answers(response: str, answer: str) -> None:
    item = Item("validation_Math_1", answer, "open")
    assert judge_leniently(response, item).is_right


@given(st.text())
def test_lenient_finds_what_strict_finds_in_open_answers(response: str) -> None:
    item = Item("validation_Math_1", "7", "open")
    assert judge_leniently(response, item).is_right >= judge_strictly(response, item).is_right


def test_guesses_are_the_official_ones() -> None:
    """Python's own generator, seeded once, draws for each response without a candidate, subject by subject."""
    items = [
        Item(f"validation_{subject}_{number}", "B", "multiple-choice", choices=OPTIONS, groups={"subject": [subject]})
        for subject in ("Music", "Art")
        for number in range(1, 31)
    ]
    outcomes = [Outcome.NO_CANDIDATE if number % 3 else Outcome.RIGHT for number in range(60)]
    outcomes[7] = Outcome.UNANSWERED
    generator = random.Random(42)
    expected = list(outcomes)
    for number in (*range(30, 60), *range(30)):  # Art comes before Music
        if outcomes[number] is Outcome.NO_CANDIDATE:
            expected[number] = Outcome.RIGHT if generator.choice("ABCD") == "B" else Outcome.WRONG
    scorings = MMMU().scorings(items, outcomes, outcomes)
    assert scorings["official"] == expected
    assert scorings["strict"] == outcomes
    assert guesses([], []) == []
