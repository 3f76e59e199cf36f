"""Deals the completions of a rollout to optimizer steps, ranks and micro-batches of about equal cost.

A group belongs to the rank that sampled it, and some completions are many times as long as others. Trained where they
were sampled, the longest would be waited for by all other ranks. So ranks tell each other what their groups cost, all
make the same plan, and groups travel to the ranks that train them. One rank alone is the same with nobody to tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from observe_r1.balancing import Item, balance
from observe_r1.experience import GroupScores, PromptGroup
from observe_r1.token_cost import GroupCost, TokenCost


@dataclass(frozen=True)
class GroupWork:
    """What dealing needs to know of a group."""

    cost: GroupCost
    lengths: list[int]  # of its completions, in tokens
    trained: list[bool]  # completions that count
    forwarded: list[bool]  # those of them that pass through the model
    prompt_bytes: int  # what travels when it is trained by another rank, but for the completions


@dataclass(frozen=True)
class RankPlan:
    """How a rollout is dealt out. Groups are numbered over all ranks."""

    owners: list[tuple[int, int]]  # of each group: the rank that sampled it, and its number there
    sums: Tensor  # [steps, 3] float64: sequences, tokens and forwarded tokens of each optimizer step
    batches: list[list[list[list[Item]]]]  # [rank][step][micro-batch]: completions, those of a group side by side

    def received(self, rank: int) -> list[int]:
        """Groups of other ranks that this one trains, whole or in part, by owner."""
        used = {g for step in self.batches[rank] for batch in step for g, _ in batch}
        return sorted((g for g in used if self.owners[g][0] != rank), key=self.owners.__getitem__)

    def sent(self, rank: int) -> list[list[int]]:
        """For each receiving rank, the groups that this one gives it, by their number here, in the order received."""
        return [
            [self.owners[g][1] for g in self.received(receiver) if self.owners[g][0] == rank]
            for receiver in range(len(self.batches))
        ]


def work_of(group: PromptGroup, cost: TokenCost, skip_zero_advantage: bool) -> GroupWork:
    """What dealing needs to know of a scored group.

    Args:
        skip_zero_advantage: Completions with advantage 0 do not pass through the model.
    """
    scores, prompt = scores_of(group), group.prompt
    lengths = [len(completion) for completion in group.completions]
    trained = scores.trained.tolist()
    useful = (scores.advantage != 0).tolist() if skip_zero_advantage else trained
    vision = prompt.vision
    return GroupWork(
        cost.group(prompt.token_ids.numel(), prompt.tower_patches, lengths),
        lengths,
        trained,
        [a and b for a, b in zip(trained, useful, strict=True)],
        prompt.token_ids.nbytes + (0 if vision is None else vision.pixel_values.nbytes),
    )


def scores_of(group: PromptGroup) -> GroupScores:
    """Its scores, which it has by now."""
    assert group.scores is not None, "groups are scored before they are dealt out"
    return group.scores


def deal(ranks: Sequence[Sequence[GroupWork]], steps: int, micro_batches: int) -> RankPlan:
    """Deals the groups of all ranks to `steps` optimizer steps of at most `micro_batches` on each rank.

    Steps are blocks of whole groups in the order in which they were drawn. A step is cut into parts of about equal
    cost, few of which split a group. They are dealt dearest first, a row for every micro-batch: what the ranks do at
    the same time costs about the same.
    """
    owners = [
        (rank, place) for place in range(max(map(len, ranks))) for rank, works in enumerate(ranks) if place < len(works)
    ]
    works = [ranks[rank][place] for rank, place in owners]
    batches: list[list[list[list[Item]]]] = [[] for _ in ranks]
    held = [{g for g, (owner, _) in enumerate(owners) if owner == rank} for rank in range(len(ranks))]
    sums = torch.zeros(steps, 3, dtype=torch.float64)
    for step, items in enumerate(_share_out(works, steps)):
        forwarded = [(g, c) for g, c in items if works[g].forwarded[c]]
        lengths = [works[g].lengths[c] for g, c in items if works[g].trained[c]]
        forwarded_tokens = sum(works[g].lengths[c] for g, c in forwarded)
        sums[step] = torch.tensor([len(lengths), sum(lengths), forwarded_tokens], dtype=torch.float64)
        parts = _parts(works, forwarded, micro_batches * len(ranks))
        for rank, dealt in enumerate(_to_ranks(parts, works, held)):
            batches[rank].append(dealt)
    return RankPlan(owners, sums, batches)


def _share_out(works: Sequence[GroupWork], steps: int) -> list[list[Item]]:
    """Completions of each optimizer step: whole groups, or where there are fewer groups than steps, parts of them."""
    completions = [[(g, c) for c in range(len(work.lengths))] for g, work in enumerate(works)]
    units = completions if len(works) >= steps else [[item] for items in completions for item in items]
    bounds = [round(len(units) * step / steps) for step in range(steps + 1)]
    return [[item for unit in units[start:end] for item in unit] for start, end in pairwise(bounds)]


def _parts(works: Sequence[GroupWork], items: Sequence[Item], count: int) -> list[list[Item]]:
    """At most `count` parts of about equal cost, the dearest first; items of a group side by side."""
    if not items:
        return []
    chosen: dict[int, list[int]] = {}
    for g, c in items:
        chosen.setdefault(g, []).append(c)
    present = list(chosen)
    costs = [GroupCost(works[g].cost.prompt, [works[g].cost.completions[c] for c in chosen[g]]) for g in present]
    balanced = balance(costs, min(count, len(items)))
    return [[(present[place], chosen[present[place]][c]) for place, c in part] for part in balanced]


def _to_ranks(
    parts: Sequence[list[Item]], works: Sequence[GroupWork], held: Sequence[set[int]]
) -> list[list[list[Item]]]:
    """Deals parts, the dearest of which come first, in rows: one for every rank, until there are none left.

    Whoever gets which part of a row, the sums of two ranks differ by no more than the dearest and the cheapest part of
    all. So parts go where most of their bytes are; `held`, the groups of each rank, grows by those that travel.
    """
    world = len(held)
    dealt: list[list[list[Item]]] = [[] for _ in held]
    for start in range(0, len(parts), world):
        row = [(part, {g for g, _ in part}) for part in parts[start : start + world]]
        spared = [
            (sum(works[g].prompt_bytes for g in groups & held[rank]), -number, -rank)
            for number, (_, groups) in enumerate(row)
            for rank in range(world)
        ]
        takers: dict[int, int] = {}
        for _, minus_number, minus_rank in sorted(spared, reverse=True):
            if -minus_number not in takers and -minus_rank not in takers.values():
                takers[-minus_number] = -minus_rank
        for number, rank in takers.items():
            dealt[rank].append(row[number][0])
            held[rank].update(row[number][1])
    return dealt
