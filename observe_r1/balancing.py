"""Deals the completions of groups to micro-batches of about equal cost, with few prompts that run twice.

A group pays its prompt in every micro-batch that has completions of it. So whole groups are spread first, the dearest
one ahead, each to the cheapest micro-batch. Where that is not even enough, groups are split: bin packing by best fit
decreasing, with the smallest limit on the cost of a micro-batch for which every group finds a place, whole or in parts.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

from observe_r1.token_cost import GroupCost

Item = tuple[int, int]  # (group, completion of the group)

SLACK = 1.05  # over an even share: the last per cent of balance would cost more in repeated prompts than it gains
PRECISION = 1.005  # of the limit


def balance(groups: Sequence[GroupCost], parts: int) -> list[list[Item]]:
    """Every completion in one of `parts` non-empty lists, in order in each list; the dearest list comes first.

    Ranks that wait for each other at every micro-batch then do the dear ones at the same time.

    No list costs more than an even share of everything and the dearest group together.
    """
    members = [[(g, c) for c in range(len(group.completions))] for g, group in enumerate(groups)]
    everything = [item for items in members for item in items]
    assert 0 < parts <= len(everything), "more micro-batches than completions"
    even = cost_of(groups, everything) / parts
    low = SLACK * max(even, *(cost_of(groups, [item]) for item in everything))
    filled = _spread([(cost_of(groups, items), items) for items in members], parts)
    high = max(cost_of(groups, items) for items in filled)
    limit = low
    while high > PRECISION * low:
        trial = _fill(groups, parts, limit)
        if trial is None:
            low = limit
        else:
            filled, high = trial, limit
        limit = (low + high) / 2
    while len(filled) < parts:
        dearest = max((items for items in filled if len(items) > 1), key=lambda items: cost_of(groups, items))
        filled.remove(dearest)
        filled += _halves(groups, dearest)
    return sorted(map(sorted, filled), key=lambda items: (-cost_of(groups, items), items))


def cost_of(groups: Sequence[GroupCost], items: Iterable[Item]) -> float:
    """What a micro-batch with these completions costs."""
    items = list(items)
    prompts = sum(groups[g].prompt for g in sorted({g for g, _ in items}))
    return prompts + sum(groups[g].completions[c] for g, c in items)


def _spread(units: Sequence[tuple[float, list[Item]]], parts: int) -> list[list[Item]]:
    """At most `parts` lists of whole units, which come with their cost: each goes to the cheapest list so far."""
    filled: list[list[Item]] = [[] for _ in range(parts)]
    costs = [0.0] * parts
    for cost, items in sorted(units, reverse=True):
        part = min(range(parts), key=lambda part: (costs[part], len(filled[part])))
        filled[part] += items
        costs[part] += cost
    return [items for items in filled if items]


def _halves(groups: Sequence[GroupCost], items: Sequence[Item]) -> list[list[Item]]:
    """Two lists of about equal cost: of whole groups, or of the completions of the only group."""
    members = {g: [item for item in items if item[0] == g] for g, _ in items}
    if len(members) > 1:
        return _spread([(cost_of(groups, part), part) for part in members.values()], 2)
    return _spread([(groups[g].completions[c], [(g, c)]) for g, c in items], 2)


def _fill(groups: Sequence[GroupCost], parts: int, limit: float) -> list[list[Item]] | None:
    """At most `parts` lists that cost no more than `limit`; None where this finds none."""
    filled: list[list[Item]] = [[] for _ in range(parts)]
    costs = [0.0] * parts
    waiting = []  # (minus its cost, group, what is left of it with the longest first): the dearest comes first
    for g, group in enumerate(groups):
        longest_first = sorted(range(len(group.completions)), key=lambda c: -group.completions[c])
        waiting.append((-(group.prompt + sum(group.completions)), g, longest_first))
    heapq.heapify(waiting)
    while waiting:
        minus_cost, g, left = heapq.heappop(waiting)
        prompt, completions = groups[g].prompt, groups[g].completions
        fitting = [part for part in range(parts) if costs[part] - minus_cost <= limit]
        if fitting:
            # the fullest leaves the others room for larger groups, but none may stay empty
            part = max(fitting, key=lambda part: (not filled[part], costs[part]))
            filled[part] += [(g, c) for c in left]
            costs[part] -= minus_cost
            continue
        part = min(range(parts), key=costs.__getitem__)
        added, rest = prompt, []
        for c in left:
            if costs[part] + added + completions[c] <= limit:
                filled[part].append((g, c))
                added += completions[c]
            else:
                rest.append(c)
        if len(rest) == len(left):
            return None
        costs[part] += added
        if rest:
            heapq.heappush(waiting, (-(prompt + sum(completions[c] for c in rest)), g, rest))
    return [items for items in filled if items]
