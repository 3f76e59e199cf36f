"""The adaptive curriculum: what it estimates, what it draws, and that a saved one goes on the same."""

from __future__ import annotations

from collections import Counter
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from observe_r1.ladder.adaptive import AdaptiveCurriculum, AdaptiveOptions

EIGHTHS = np.arange(9) / 8
BY: st.SearchStrategy[Literal["level", "sample"]] = st.sampled_from(["level", "sample"])


def observed(
    curriculum: AdaptiveCurriculum, outcomes: dict[int, tuple[int, int]], unusable: tuple[int, ...] = ()
) -> None:
    positions = [*outcomes, *unusable]
    correct = np.array([*(correct for correct, _ in outcomes.values()), *(0 for _ in unusable)], dtype=float)
    total = np.array([*(total for _, total in outcomes.values()), *(0 for _ in unusable)], dtype=float)
    curriculum.observe(positions, correct, total, np.array([position in unusable for position in positions]))


def test_it_starts_from_the_ladders_difficulties() -> None:
    curriculum = AdaptiveCurriculum(np.array([*EIGHTHS, np.nan, 0.26]), AdaptiveOptions(floor=0.1))
    assert curriculum.pass_rates() == pytest.approx([*(1 - EIGHTHS), 0.5, 0.75])
    weights = [max(4 * d * (1 - d), 0.1) for d in EIGHTHS]
    assert curriculum.weights() == pytest.approx([*weights, 1.0, weights[2]])


@pytest.mark.parametrize("by", ["level", "sample"])
def test_estimates_follow_what_is_observed(by: Literal["level", "sample"]) -> None:
    curriculum = AdaptiveCurriculum(np.array([0.5, 0.5, 1.0]), AdaptiveOptions(by, half_life=1, prior=4))
    observed(curriculum, {0: (8, 8)})
    level = (4 * 0.5 / 2 + 8) / (4 / 2 + 8)  # the prior counts half by now
    own = (8 + 4 * level) / (8 + 4)
    assert curriculum.pass_rates() == pytest.approx([own if by == "sample" else level, level, 0.0])
    observed(curriculum, {0: (0, 8)})
    level = (9 / 2 + 0) / (10 / 2 + 8)
    own = (8 / 2 + 4 * level) / (8 / 2 + 8 + 4)
    assert curriculum.pass_rates() == pytest.approx([own if by == "sample" else level, level, 0.0])


def test_draws_are_in_proportion_to_the_weights() -> None:
    curriculum = AdaptiveCurriculum(np.array([0.5, 0.75, 0.875, 0.0]), AdaptiveOptions(floor=0.05))
    first = Counter(curriculum.draw(1, (0, turn))[0] for turn in range(8000))
    weights = curriculum.weights()
    assert [first[n] / 8000 for n in range(4)] == pytest.approx(weights / weights.sum(), abs=0.02)
    # two different ones: the second in proportion among what the first left
    share = weights / weights.sum()
    pairs = Counter(tuple(curriculum.draw(2, (1, turn))) for turn in range(8000))
    for (one, other), count in pairs.items():
        assert count / 8000 == pytest.approx(share[one] * share[other] / (1 - share[one]), abs=0.02)


@given(st.integers(1, 40), st.integers(0, 60), st.frozensets(st.integers(0, 39)))
def test_a_draw_repeats_nothing_and_leaves_out_what_is_unusable(size: int, count: int, bad: frozenset[int]) -> None:
    unusable = tuple(position for position in sorted(bad) if position < size)
    curriculum = AdaptiveCurriculum(np.linspace(0, 1, size), AdaptiveOptions())
    observed(curriculum, {}, unusable)
    drawn = curriculum.draw(count, (3,))
    assert len(set(drawn)) == len(drawn) == min(count, size - len(unusable))
    assert not set(drawn) & set(unusable)


@given(BY, st.data())
def test_a_saved_curriculum_goes_on_as_it_would_have(by: Literal["level", "sample"], data: st.DataObject) -> None:
    difficulties = np.array(data.draw(st.lists(st.sampled_from([*EIGHTHS, np.nan]), min_size=1, max_size=30)))
    outcome = st.tuples(st.integers(0, 4), st.just(4))
    outcomes = st.dictionaries(st.integers(0, len(difficulties) - 1), outcome)
    one = AdaptiveCurriculum(difficulties, AdaptiveOptions(by))
    observed(one, data.draw(outcomes))
    observed(one, {}, (0,))
    other = AdaptiveCurriculum(difficulties, AdaptiveOptions(by))
    other.load_state_dict(one.state_dict())
    later = data.draw(outcomes)
    for curriculum in (one, other):
        observed(curriculum, later)
    assert np.array_equal(one.weights(), other.weights())
    assert one.draw(10, (1, 2)) == other.draw(10, (1, 2))


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"by": "shard"}, "adaptive.by is 'shard'; choose level or sample"),
        ({"half_life": 0}, "half_life is 0"),
        ({"prior": 0}, "prior 0"),
        ({"floor": 0}, "floor 0"),
    ],
)
def test_impossible_options(wrong: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        AdaptiveOptions(**wrong)  # type: ignore[arg-type]
