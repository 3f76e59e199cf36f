"""Micro-batches of about equal cost: what always holds, and how good they are on lengths as they come."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from observe_r1.balancing import PRECISION, SLACK, Item, balance, cost_of
from observe_r1.token_cost import GroupCost, TokenCost

# a model of the size of Qwen2.5-VL-3B, its vision tower trained
THREE_BILLION = TokenCost(attention=5.3e-5, head=0.112, vision=0.229, vision_attention=3.7e-6)

costs = st.floats(0, 1000)
any_groups = st.lists(st.builds(GroupCost, costs, st.lists(costs, min_size=1, max_size=8)), min_size=1, max_size=12)


def cost_of_whole(groups: list[GroupCost]) -> float:
    return sum(group.prompt + sum(group.completions) for group in groups)


def items_of(groups: list[GroupCost]) -> list[Item]:
    return [(g, c) for g, group in enumerate(groups) for c in range(len(group.completions))]


def realistic_groups(count: int, seed: int) -> list[GroupCost]:
    """8 completions each, of lognormal length with a mean of 300; prompts of 200 to 1500 tokens, 70 % of them image."""
    generator = random.Random(seed)
    groups = []
    for _ in range(count):
        prompt = generator.randint(200, 1500)
        lengths = [min(2048, 1 + int(generator.lognormvariate(math.log(300) - 0.32, 0.8))) for _ in range(8)]
        groups.append(THREE_BILLION.group(prompt, [4 * int(0.7 * prompt)], lengths))
    return groups


@given(any_groups, st.data())
def test_every_completion_is_in_one_part_in_order_and_no_part_is_empty(
    groups: list[GroupCost], data: st.DataObject
) -> None:
    parts = data.draw(st.integers(1, len(items_of(groups))))
    balanced = balance(groups, parts)
    assert len(balanced) == parts
    assert all(balanced)
    assert sorted(item for part in balanced for item in part) == items_of(groups)
    assert all(part == sorted(part) for part in balanced)
    assert balanced == balance(groups, parts)


@given(any_groups, st.data())
def test_no_part_costs_more_than_an_even_share_and_the_dearest_group(
    groups: list[GroupCost], data: st.DataObject
) -> None:
    parts = data.draw(st.integers(1, len(items_of(groups))))
    by_part = [cost_of(groups, part) for part in balance(groups, parts)]
    dearest_group = max(group.prompt + sum(group.completions) for group in groups)
    assert max(by_part) <= (cost_of_whole(groups) / parts + dearest_group) * (1 + 1e-9)
    assert by_part == sorted(by_part, reverse=True)


@given(st.lists(st.lists(costs, min_size=1, max_size=8), min_size=1, max_size=12), st.data())
def test_completions_without_a_prompt_to_repeat_come_close_to_even(
    completions: list[list[float]], data: st.DataObject
) -> None:
    groups = [GroupCost(0.0, group) for group in completions]
    parts = data.draw(st.integers(1, len(items_of(groups))))
    even = cost_of_whole(groups) / parts
    dearest = max(max(group) for group in completions)
    # a limit fails only where the cheapest part is within one completion of it
    bound = PRECISION * max(even + dearest, SLACK * even, SLACK * dearest)
    assert max(cost_of(groups, part) for part in balance(groups, parts)) <= bound * (1 + 1e-9)


@pytest.mark.parametrize(("groups", "parts"), [(16, 2), (16, 4), (16, 8), (32, 8), (32, 16), (64, 16), (64, 32)])
def test_realistic_lengths_are_even_to_a_tenth_and_few_prompts_run_twice(groups: int, parts: int) -> None:
    overheads = []
    for seed in range(5):
        mix = realistic_groups(groups, seed)
        by_part = [cost_of(mix, part) for part in balance(mix, parts)]
        assert max(by_part) <= 1.1 * statistics.fmean(by_part)
        overheads.append(sum(by_part) / cost_of_whole(mix) - 1)
    assert statistics.fmean(overheads) < 0.02
    assert max(overheads) < 0.06


@pytest.mark.parametrize("parts", [16, 32, 100])
def test_where_groups_have_to_be_split_the_dearest_part_is_near_the_least_possible(parts: int) -> None:
    for seed in range(5):
        mix = realistic_groups(16, seed)
        dearest_item = max(cost_of(mix, [item]) for item in items_of(mix))
        least = max(cost_of_whole(mix) / parts, dearest_item)  # without the prompts that have to run twice
        assert max(cost_of(mix, part) for part in balance(mix, parts)) <= 1.35 * least


def test_groups_that_fit_stay_whole() -> None:
    groups = [GroupCost(100.0, [25.0] * 4) for _ in range(8)]
    for parts in (1, 2, 4, 8):
        balanced = balance(groups, parts)
        assert all(len(part) == 32 // parts for part in balanced)
        assert sum(cost_of(groups, part) for part in balanced) == cost_of_whole(groups)


def test_only_the_group_that_is_too_large_is_split() -> None:
    groups = [GroupCost(10.0, [50.0]), GroupCost(10.0, [60.0] * 6), GroupCost(10.0, [50.0])]
    balanced = balance(groups, 4)
    assert sorted(balanced) == [[(0, 0), (2, 0)], [(1, 0), (1, 1)], [(1, 2), (1, 3)], [(1, 4), (1, 5)]]


def test_a_dear_prompt_is_not_repeated_for_little_balance() -> None:
    groups = [GroupCost(1000.0, [10.0] * 8), GroupCost(1000.0, [20.0] * 8), GroupCost(1000.0, [15.0] * 8)]
    assert [{g for g, _ in part} for part in balance(groups, 3)] == [{1}, {2}, {0}]
