"""Counting and intervals."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from observe_r1.evaluation import Item, Outcome, Tally, wilson_interval
from observe_r1.evaluation.tally import NORMAL_95, break_down, tally

R, W, N, U = Outcome.RIGHT, Outcome.WRONG, Outcome.NO_CANDIDATE, Outcome.UNANSWERED


@given(st.integers(1, 5000).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_the_bounds_are_where_the_score_test_just_accepts(counts: tuple[int, int]) -> None:
    """|p - bound| = z · √(bound (1 - bound) / n), which is how Wilson defines them."""
    correct, total = counts
    share = correct / total
    low, high = wilson_interval(correct, total)
    assert 0 <= low <= share <= high <= 1
    for bound in (low, high):
        assert abs(share - bound) == pytest.approx(NORMAL_95 * (bound * (1 - bound) / total) ** 0.5, abs=1e-6)


@pytest.mark.parametrize(("correct", "total"), [(0, 0), (2, 1), (-1, 3)])
def test_impossible_counts_are_refused(correct: int, total: int) -> None:
    with pytest.raises(ValueError, match="right of"):
        wilson_interval(correct, total)


def test_known_interval() -> None:
    """348 of 1,000, to four decimals, from a table of score intervals computed with exact fractions below."""
    low, high = wilson_interval(348, 1000)
    z = Fraction(NORMAL_95)
    for bound in map(Fraction, (low, high)):
        assert abs(float((Fraction(348, 1000) - bound) ** 2 - z**2 * bound * (1 - bound) / 1000)) < 1e-12
    assert (round(low, 3), round(high, 3)) == (0.319, 0.378)


def test_breakdowns() -> None:
    items = [
        Item("1", "x", groups={"task": ["a"], "skills": ["p", "q", "p"]}),
        Item("2", "x", groups={"task": ["b"], "skills": ["q"]}),
        Item("3", "x", groups={"task": ["b"], "skills": []}),
        Item("4", "x", groups={"task": ["c"], "skills": ["r"]}),
    ]
    assert break_down(items, [W, R, N, U]) == {
        "task": {"b": Tally(1, 2), "a": Tally(0, 1)},
        "skills": {"q": Tally(1, 2), "p": Tally(0, 1)},
    }
    assert list(break_down(items, [W, R, N, U])["task"]) == ["b", "a"]
    assert tally([W, R, N, U]) == Tally(1, 3)
    assert tally([U]) is None
