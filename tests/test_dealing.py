"""Groups dealt to ranks: what always holds, and how even it is on lengths as they come."""

from __future__ import annotations

import math
import random
import statistics
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from observe_r1.balancing import cost_of
from observe_r1.dealing import GroupWork, RankPlan, deal
from observe_r1.token_cost import GroupCost, TokenCost

# a model of the size of Qwen2.5-VL-3B, its vision tower trained
THREE_BILLION = TokenCost(attention=5.3e-5, head=0.112, vision=0.229, vision_attention=3.7e-6)


@st.composite
def group_works(draw: st.DrawFn) -> GroupWork:
    lengths = draw(st.lists(st.integers(1, 50), min_size=1, max_size=6))
    trained = [draw(st.booleans()) for _ in lengths]
    forwarded = [flag and draw(st.booleans()) for flag in trained]
    cost = GroupCost(draw(st.floats(0, 100)), [float(length) for length in lengths])
    return GroupWork(cost, lengths, trained, forwarded, draw(st.integers(0, 1000)))


# a rank may have none, but not all of them
all_ranks = st.lists(st.lists(group_works(), max_size=4), min_size=1, max_size=5).filter(any)


def costs_of(plan: RankPlan, ranks: list[list[GroupWork]], step: int) -> list[list[float]]:
    """Of each rank's micro-batches of a step."""
    costs = [ranks[rank][place].cost for rank, place in plan.owners]
    return [[cost_of(costs, batch) for batch in batches[step]] for batches in plan.batches]


@given(all_ranks, st.integers(1, 3), st.integers(1, 4))
def test_every_completion_is_trained_once_and_by_a_rank_that_has_its_group(
    ranks: list[list[GroupWork]], steps: int, micro_batches: int
) -> None:
    plan = deal(ranks, steps, micro_batches)
    works = [ranks[rank][place] for rank, place in plan.owners]
    dealt = Counter(item for rank in plan.batches for step in rank for batch in step for item in batch)
    assert dealt == Counter((g, c) for g, work in enumerate(works) for c, flag in enumerate(work.forwarded) if flag)
    trained = [length for work in works for length, flag in zip(work.lengths, work.trained, strict=True) if flag]
    forwarded = [works[g].lengths[c] for g, c in dealt]
    assert plan.sums.sum(0).tolist() == [len(trained), sum(trained), sum(forwarded)]
    for rank, batches in enumerate(plan.batches):
        has = {g for g, (owner, _) in enumerate(plan.owners) if owner == rank} | set(plan.received(rank))
        assert all(g in has for step in batches for batch in step for g, _ in batch)
        assert all(batch for step in batches for batch in step)
        assert all(len(step) <= micro_batches for step in batches)
        sent = [(owner, g) for owner in range(len(ranks)) for g in plan.sent(owner)[rank]]
        assert [plan.owners[g] for g in plan.received(rank)] == sent
    assert deal(ranks, steps, micro_batches).batches == plan.batches  # every rank makes the plan for itself


@given(all_ranks, st.integers(1, 4))
def test_ranks_differ_by_no_more_than_two_of_their_micro_batches_do(
    ranks: list[list[GroupWork]], micro_batches: int
) -> None:
    by_rank = costs_of(deal(ranks, 1, micro_batches), ranks, 0)
    padded = [costs + [0.0] * (micro_batches - len(costs)) for costs in by_rank]
    every = [cost for costs in padded for cost in costs]
    sums = [sum(costs) for costs in padded]
    assert max(sums) - min(sums) <= max(every) - min(every) + 1e-6
    rows = list(zip(*padded, strict=True))
    assert all(min(row) >= max(later) for row, later in pairwise(rows))


@given(all_ranks, st.integers(1, 3))
def test_a_group_travels_to_a_rank_once_and_only_where_it_is_trained(
    ranks: list[list[GroupWork]], micro_batches: int
) -> None:
    plan = deal(ranks, 2, micro_batches)
    for rank, batches in enumerate(plan.batches):
        received = plan.received(rank)
        assert len(set(received)) == len(received)
        assert set(received) <= {g for step in batches for batch in step for g, _ in batch}


def sampled(prompts: int, size: int, seed: int) -> list[GroupWork]:
    """Lognormal lengths with a mean of 300; prompts of 200 to 1500 tokens, 70 % of them image."""
    generator = random.Random(seed)
    works = []
    for _ in range(prompts):
        tokens = generator.randint(200, 1500)
        lengths = [min(8192, 1 + int(generator.lognormvariate(math.log(300) - 0.32, 0.8))) for _ in range(size)]
        cost = THREE_BILLION.group(tokens, [4 * int(0.7 * tokens)], lengths)
        works.append(GroupWork(cost, lengths, [True] * size, [True] * size, tokens))
    return works


def waiting(ranks: list[list[GroupWork]], plans: list[RankPlan]) -> float:
    """Share of the time that ranks wait, when they do each micro-batch at the same time; a plan for all or for each."""
    if len(plans) == 1:
        costs = costs_of(plans[0], ranks, 0)
    else:
        costs = [costs_of(plan, [own], 0)[0] for own, plan in zip(ranks, plans, strict=True)]
    rows = list(zip(*costs, strict=True))
    return 1 - sum(map(sum, rows)) / (len(ranks) * sum(map(max, rows)))


@pytest.mark.parametrize(("world", "prompts", "size"), [(2, 32, 8), (8, 128, 8), (8, 512, 16), (64, 1024, 16)])
def test_on_ragged_lengths_ranks_wait_a_small_part_of_what_they_did(world: int, prompts: int, size: int) -> None:
    before, after = [], []
    for seed in range(3):
        works = sampled(prompts, size, seed)
        ranks = [works[rank::world] for rank in range(world)]
        before.append(waiting(ranks, [deal([own], 1, 4) for own in ranks]))
        after.append(waiting(ranks, [deal(ranks, 1, 4)]))
    assert statistics.fmean(after) < 0.04
    assert statistics.fmean(after) < statistics.fmean(before) / 2
