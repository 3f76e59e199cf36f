"""Bonus, normalisation and weight against a reference that shares nothing with the code under test."""

from __future__ import annotations

import math
import statistics
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from observe_r1.advantages import AdvantageOptions, concise_bonus, dynamic_weight, group_advantages

REWARDS = st.lists(st.sampled_from([0.0, 0.5, 0.7, 1.0, 1.2, 1.5, 1.7, -0.3]), min_size=1, max_size=16)


@given(REWARDS)
def test_advantages_match_exact_arithmetic(rewards: list[float]) -> None:
    """The reference works with fractions and takes one square root at the end."""
    result = group_advantages(torch.tensor(rewards, dtype=torch.float64)).tolist()
    exact = [Fraction(reward) for reward in rewards]
    mean = sum(exact) / len(exact)
    if len(set(exact)) == 1:
        assert result == [0.0] * len(rewards)
        return
    variance = sum((reward - mean) ** 2 for reward in exact) / (len(exact) - 1)
    expected = [float(reward - mean) / (math.sqrt(variance) + 1e-9) for reward in exact]
    assert result == pytest.approx(expected, rel=1e-12, abs=1e-12)


@given(REWARDS.filter(lambda rewards: len(set(rewards)) > 1))
def test_without_scale_only_the_mean_is_taken_off(rewards: list[float]) -> None:
    result = group_advantages(torch.tensor(rewards), scale="none").tolist()
    assert result == pytest.approx([reward - statistics.fmean(rewards) for reward in rewards], abs=1e-6)


@pytest.mark.parametrize("reward", [0.0, 0.7, 0.1 + 0.2, 1.5])
def test_equal_rewards_have_no_advantage_at_all(reward: float) -> None:
    """The release's float noise gave 0.92 for eight times 0.7."""
    assert not group_advantages(torch.full((8,), reward, dtype=torch.float32)).any()


def test_rewards_that_differ_by_rounding_only_are_equal() -> None:
    assert not group_advantages(torch.tensor([0.1 + 0.2, 0.3, 0.3], dtype=torch.float64)).any()


@pytest.mark.parametrize(
    ("correct", "lengths", "expected"),
    [
        ([1, 1, 0], [150, 120, 110], [0.0, 0.2, 0.0]),  # the shortest correct one, not the shortest
        ([1, 1, 1], [150, 100, 300], [0.0, 0.0, 0.0]),  # the shortest is not above the constraint: nobody
        ([1, 1], [101, 101], [0.2, 0.0]),  # the first of equals
        ([0, 0], [150, 200], [0.0, 0.0]),  # the release gives this to sample 0
        ([0, 0, 1], [101, 102, 400], [0.0, 0.0, 0.2]),
    ],
)
def test_concise_bonus(correct: list[int], lengths: list[int], expected: list[float]) -> None:
    given_bonus = concise_bonus(torch.tensor(correct, dtype=torch.bool), torch.tensor(lengths), 0.2, 100)
    assert given_bonus.tolist() == expected


@given(st.integers(1, 16).flatmap(lambda size: st.tuples(st.integers(0, size), st.just(size))))
def test_dynamic_weight_equals_the_paper_in_difficulty(counts: tuple[int, int]) -> None:
    correct, size = counts
    difficulty = 1 - correct / size
    assert dynamic_weight(correct / size, 1.8) == pytest.approx(4 * 1.8 * difficulty * (1 - difficulty))
    assert 0 <= dynamic_weight(correct / size, 1.8) <= 1.8


@pytest.mark.parametrize("options", [{"bonus": -0.1}, {"dynamic_weight": 0.0}])
def test_options_that_make_no_sense_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        AdvantageOptions(**options)  # type: ignore[arg-type]
