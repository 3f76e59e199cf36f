"""The order of a ladder and the mixing of its levels."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from observe_r1.ladder.curriculum import PAPER_MIXING, Mixing, arrange, split_held_out, stage_counts

LEVEL_SHARES = [0.015, 0.035, 0.05, 0.075, 0.135, 0.15, 0.15, 0.20, 0.19]  # of the paper's 20,000 samples
STAGE_SHARES = [0.041, 0.043, 0.055, 0.079, 0.112, 0.135, 0.154, 0.179, 0.203]  # what they imply for its matrix

ladders = st.lists(
    st.tuples(st.sampled_from(PAPER_MIXING.levels) | st.floats(0, 1), st.none() | st.integers(50, 400)), max_size=60
)


def test_without_mixing_the_order_is_difficulty_complexity_id():
    curriculum = arrange([0.5, 0.25, 0.5, 0.5, 0.5], [10, 99, None, 5, 10], ["b", "x", "c", "d", "a"], mixing=None)
    assert curriculum.order == (1, 3, 4, 0, 2)
    assert curriculum.stages == (None,) * 5


@settings(deadline=None)
@given(samples=ladders, seed=st.integers(0, 5))
def test_every_sample_is_used_once_in_ascending_stages(samples, seed):
    difficulties = [difficulty for difficulty, _ in samples]
    complexities = [complexity for _, complexity in samples]
    ids = [str(number) for number in range(len(samples))]
    curriculum = arrange(difficulties, complexities, ids, seed=seed)
    assert sorted(curriculum.order) == list(range(len(samples)))
    assert list(curriculum.stages) == sorted(curriculum.stages)
    assert curriculum == arrange(difficulties, complexities, ids, seed=seed)


@settings(deadline=None)
@given(samples=ladders, seed=st.integers(0, 5))
def test_the_order_does_not_depend_on_the_order_of_the_input(samples, seed):
    rows = [(difficulty, complexity, str(number)) for number, (difficulty, complexity) in enumerate(samples)]
    shuffled = random.Random(seed).sample(rows, len(rows))

    def ids(rows):
        columns = list(zip(*rows, strict=True)) or [(), (), ()]
        return [columns[2][place] for place in arrange(*columns, seed=seed).order]

    assert ids(rows) == ids(shuffled)


def test_the_seed_changes_the_order_within_stages_only():
    difficulties = [number % 9 / 8 for number in range(900)]
    complexities, ids = list(range(900)), [str(number) for number in range(900)]
    one, other = (arrange(difficulties, complexities, ids, seed=seed) for seed in (1, 2))
    assert one.order != other.order
    assert dict(zip(one.order, one.stages, strict=True)) == dict(zip(other.order, other.stages, strict=True))


def test_the_papers_level_shares_give_the_papers_stages():
    level_counts = [round(20_000 * share) for share in LEVEL_SHARES]
    counts = np.array(stage_counts(level_counts, PAPER_MIXING))
    np.testing.assert_array_equal(counts.sum(axis=0), level_counts)
    np.testing.assert_allclose(counts.sum(axis=1) / 20_000, STAGE_SHARES, atol=0.002)
    shares = counts / counts.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(shares, PAPER_MIXING.shares, atol=0.005)


@given(level_counts=st.lists(st.integers(0, 500), min_size=9, max_size=9))
@settings(deadline=None, max_examples=30)
def test_stages_share_out_exactly_the_samples_there_are(level_counts):
    counts = np.array(stage_counts(level_counts, PAPER_MIXING))
    assert (counts >= 0).all()
    np.testing.assert_array_equal(counts.sum(axis=0), level_counts)
    assert not counts[np.array(PAPER_MIXING.shares) == 0].any()


@given(level_counts=st.lists(st.integers(0, 500), min_size=9, max_size=9).filter(any))
@settings(deadline=None, max_examples=30)
def test_an_empty_stage_would_explain_the_levels_worse(level_counts):
    """The sizes are the most likely ones (the log-likelihood is concave): no stage's share of them raises it."""
    scale = 1_000_000  # rounding to whole samples is then of no account
    histogram = np.array(level_counts) * scale
    sizes = np.array(stage_counts(histogram.tolist(), PAPER_MIXING)).sum(axis=1)
    matrix = np.array(PAPER_MIXING.shares) / np.sum(PAPER_MIXING.shares, axis=1, keepdims=True)
    explained = sizes @ matrix
    slopes = matrix @ np.divide(histogram, explained, out=np.zeros(9), where=explained > 0)
    assert slopes.max() < 1.001
    np.testing.assert_allclose(slopes[sizes > 0.01 * sizes.sum()], 1, atol=0.001)


def test_a_matrix_that_can_be_met_is_met():
    mixing = Mixing((0.0, 1.0), (1.0, 2.0), ((0.8, 0.2), (0.1, 0.9)))
    assert stage_counts([90, 110], mixing) == [[80, 20], [10, 90]]


def test_a_stage_of_absent_levels_is_empty():
    mixing = Mixing((0.0, 1.0), (1.0, 2.0), ((1, 0), (0, 1)))
    curriculum = arrange([1.0, 1.0], [None, None], ["a", "b"], mixing)
    assert curriculum.stages == (2.0, 2.0)


def test_less_complex_samples_of_a_level_come_in_earlier_stages():
    mixing = Mixing((0.0, 1.0), (1.0, 2.0), ((0.8, 0.2), (0.2, 0.8)))
    complexities = list(range(100))
    curriculum = arrange([0.0] * 50 + [1.0] * 50, complexities, [str(number) for number in range(100)], mixing)
    stage_of = dict(zip(curriculum.order, curriculum.stages, strict=True))
    assert [stage_of[sample] for sample in range(50)] == [1.0] * 40 + [2.0] * 10


def test_a_difficulty_between_levels_counts_for_the_nearer():
    mixing = Mixing((0.0, 0.5, 1.0), (0.0, 0.5, 1.0), ((1, 0, 0), (0, 1, 0), (0, 0, 1)))
    difficulties = [0.2, 0.25, 0.3, 0.75, 0.8]
    curriculum = arrange(difficulties, [None] * 5, list("abcde"), mixing)
    stage_of = dict(zip(curriculum.order, curriculum.stages, strict=True))
    assert [stage_of[sample] for sample in range(5)] == [0.0, 0.0, 0.5, 0.5, 1.0]


@given(total=st.integers(1, 200), data=st.data(), seed=st.integers(0, 9))
def test_held_out_samples_are_spread_and_leave_the_rest_in_order(total, data, seed):
    count = data.draw(st.integers(0, total - 1))
    kept, held_out = split_held_out(range(total), count, seed)
    assert len(held_out) == count
    assert sorted(kept + held_out) == list(range(total))
    assert kept == sorted(kept)
    for place, sample in enumerate(held_out):
        assert place * total / count - 1 < sample < (place + 1) * total / count


@pytest.mark.parametrize("count", [-1, 4, 5])
def test_holding_out_everything_is_refused(count):
    with pytest.raises(ValueError, match=f"hold out {count} of 4 .* 3 or less"):
        split_held_out(range(4), count)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((0.0, 1.0), (1.0,), ((1, 1), (1, 1))), "1 stages and 2 levels"),
        (((0.0, 1.0), (1.0,), ((1,),)), "1 stages and 2 levels"),
        (((0.0, 1.0), (1.0,), ((1, -1),)), "at least 0"),
        (((0.0, 1.0), (1.0,), ((1, 0),)), "share above 0"),
        (((1.0, 0.0), (1.0,), ((1, 1),)), "ascending"),
    ],
)
def test_a_wrong_matrix_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Mixing(*arguments)


def test_wrong_measurements_are_refused():
    with pytest.raises(ValueError, match="2 difficulties, 1 complexities and 2 ids"):
        arrange([0, 1], [1], ["a", "b"])
    with pytest.raises(ValueError, match=r"found 1\.5"):
        arrange([1.5], [1], ["a"])
