"""The held-out pass rate: by level, over batches and ranks."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from observe_r1.metrics import PassRate, level_name, level_of

ANSWERS = st.lists(
    st.tuples(st.sampled_from([None, 0.0, 0.125, 0.5, 0.875, 1.0]), st.booleans(), st.booleans(), st.integers(1, 50)),
    min_size=1,
    max_size=60,
)


def update(metric: PassRate, answers: list[tuple[float | None, bool, bool, int]]) -> None:
    levels, correct, well_formed, lengths = zip(*answers, strict=True)
    metric.update(levels, torch.tensor(correct), torch.tensor(well_formed), torch.tensor(lengths))


@given(ANSWERS, st.integers(0, 100))
def test_any_batches_give_the_shares(answers: list[tuple[float | None, bool, bool, int]], seed: int) -> None:
    metric = PassRate()
    generator = random.Random(seed)
    start = 0
    while start < len(answers):
        size = generator.randint(1, 7)
        update(metric, answers[start : start + size])
        start += size
    result = metric.compute()
    assert float(result["pass_rate"]) == pytest.approx(sum(a[1] for a in answers) / len(answers))
    assert float(result["format_rate"]) == pytest.approx(sum(a[2] for a in answers) / len(answers))
    assert float(result["length"]) == pytest.approx(sum(a[3] for a in answers) / len(answers))
    for level in {a[0] for a in answers} - {None}:
        rate = [a[1] for a in answers if a[0] == level]
        name = f"pass_rate_by_level/{level_name(level_of(level) or 0)}"
        assert float(result[name]) == pytest.approx(sum(rate) / len(rate))
    assert sum("level" in name for name in result) == len({a[0] for a in answers} - {None})


@given(ANSWERS, ANSWERS)
def test_two_ranks_add_up(
    one: list[tuple[float | None, bool, bool, int]], other: list[tuple[float | None, bool, bool, int]]
) -> None:
    """States are sums, so merging them is what a reduction over ranks does."""
    together, first, second = PassRate(), PassRate(), PassRate()
    update(together, one + other)
    update(first, one)
    update(second, other)
    first.merge_state(second)
    assert {k: float(v) for k, v in first.compute().items()} == {k: float(v) for k, v in together.compute().items()}


def test_half_precision_does_not_lose_count() -> None:
    """Lightning casts the whole module, and with it the states of its metrics."""
    metric = torch.nn.ModuleList([PassRate()]).to(torch.bfloat16)[0]
    assert isinstance(metric, PassRate)
    for _ in range(3):
        update(metric, [(0.5, True, True, 7)] * 201)
    update(metric, [(0.5, False, False, 7)])
    assert float(metric.compute()["pass_rate"]) == pytest.approx(603 / 604)


def test_nothing_measured_is_nothing_logged() -> None:
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert PassRate().compute() == {}


@pytest.mark.parametrize(("difficulty", "level"), [(None, None), (0.0, 0), (0.06, 0), (0.07, 1), (1.0, 8), (0.5, 4)])
def test_levels_are_eighths(difficulty: float | None, level: int | None) -> None:
    assert level_of(difficulty) == level
