"""Deals the completions of a rollout to optimizer steps and micro-batches, and assembles what `training_step` reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby, pairwise

import torch
from torch import Tensor

from observe_r1.balancing import Item, balance, cost_of
from observe_r1.experience import (
    Assignment,
    Experience,
    GroupScores,
    GroupSlice,
    MicroBatch,
    OptimizerStep,
    PromptGroup,
    StepTotals,
)
from observe_r1.token_cost import GroupCost, TokenCost


def deal_steps(
    groups: Sequence[PromptGroup],
    *,
    steps: int,
    epochs: int,
    micro_batches: int,
    skip_zero_advantage: bool,
    cost: TokenCost,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda values: values,
) -> list[OptimizerStep]:
    """The optimizer steps of a rollout: `steps` blocks of whole groups in curriculum order, passed over `epochs` times.

    Every step has exactly `micro_batches` micro-batches of about equal cost, the dearest first, none of them empty:
    where a step has too little to train on, micro-batches that count nothing fill in.

    Args:
        skip_zero_advantage: Completions with advantage 0 do not pass through the model. Only right when nothing else
            gives them a gradient (no KL); they still count in the totals, so the loss is the same.
        cost: Of a completion and of its prompt, which every micro-batch with completions of the group pays.
        sum_over_ranks: Adds a tensor up over all ranks.

    Raises:
        ValueError: There are no groups.
    """
    if not groups:
        raise ValueError("A rollout without any prompt cannot be trained on: every sample of it was skipped.")
    everything = [(g, c) for g, group in enumerate(groups) for c in range(len(group.completions))]
    costs = [_group_cost(group, cost) for group in groups]
    filler = _assignment([min(everything, key=lambda item: (cost_of(costs, [item]), item))])
    dealt: list[OptimizerStep] = []
    for part in _share_out(groups, steps):
        trained = [(g, c) for g, c in part if _is_trained(groups[g], c)]
        forwarded = [
            (g, c) for g, c in trained if not skip_zero_advantage or float(_scores(groups[g]).advantage[c]) != 0.0
        ]
        sums = sum_over_ranks(
            torch.tensor([len(trained), _tokens(groups, trained), _tokens(groups, forwarded)], dtype=torch.float64)
        ).tolist()
        # a step in which nothing is trained has loss 0; its denominator only has to be finite
        totals = StepTotals(*(max(value, 1.0) for value in sums))
        full = min(micro_batches, len(forwarded))
        batches = _deal(costs, forwarded, full) if full else []
        batches += [filler] * (micro_batches - full)
        dealt.append(OptimizerStep(batches, totals, frozenset(range(full, micro_batches))))
    return dealt * epochs


def _share_out(groups: Sequence[PromptGroup], steps: int) -> list[list[Item]]:
    """Completions of each optimizer step: whole groups, or where there are fewer groups than steps, parts of them."""
    completions = [[(g, c) for c in range(len(group.completions))] for g, group in enumerate(groups)]
    units = completions if len(groups) >= steps else [[item] for items in completions for item in items]
    bounds = [round(len(units) * step / steps) for step in range(steps + 1)]
    return [[item for unit in units[start:end] for item in unit] for start, end in pairwise(bounds)]


def _group_cost(group: PromptGroup, cost: TokenCost) -> GroupCost:
    prompt, lengths = group.prompt, [len(completion) for completion in group.completions]
    return cost.group(prompt.token_ids.numel(), prompt.tower_patches, lengths)


def _deal(costs: Sequence[GroupCost], items: Sequence[Item], parts: int) -> list[Assignment]:
    """`items`, which are in order, in micro-batches of about equal cost."""
    present = _assignment(items)
    subsets = [GroupCost(costs[g].prompt, [costs[g].completions[c] for c in chosen]) for g, chosen in present]
    balanced = balance(subsets, parts)
    return [_assignment([(present[g][0], present[g][1][c]) for g, c in part]) for part in balanced]


def assemble(experience: Experience, number: int) -> MicroBatch:
    """Micro-batch `number` of a rollout, counted over all its optimizer steps."""
    index = number
    for step in experience.steps:
        if index < len(step.micro_batches):
            break
        index -= len(step.micro_batches)
    else:
        raise IndexError(f"micro-batch {number} of a rollout that has {len(experience)}")
    return assemble_step(experience.groups, step, index)


def assemble_step(groups: Sequence[PromptGroup], step: OptimizerStep, index: int) -> MicroBatch:
    """The tensors of one micro-batch of a step, completions in the order of its assignment."""
    assignment, is_filler = step.micro_batches[index], index in step.fillers
    items = [(g, c) for g, completions in assignment for c in completions]
    chosen = [groups[g].completions[c] for g, c in items]
    return MicroBatch(
        slices=[
            GroupSlice(groups[g].prompt, [groups[g].completions[c].token_ids for c in completions])
            for g, completions in assignment
        ],
        lengths=torch.tensor([len(completion) for completion in chosen]),
        advantages=torch.stack([_scores(groups[g]).advantage[c] for g, c in items]).float(),
        trained=torch.tensor([float(_is_trained(groups[g], c) and not is_filler) for g, c in items]),
        sampler_logprobs=torch.cat([completion.sampler_logprobs for completion in chosen]),
        totals=step.totals,
        last_of_step=index == len(step.micro_batches) - 1,
        is_filler=is_filler,
        old_logprobs=_gather([groups[g].old_logprobs for g, _ in items], items),
        reference_logprobs=_gather([groups[g].reference_logprobs for g, _ in items], items),
    )


def _gather(logprobs: Sequence[list[Tensor] | None], items: Sequence[Item]) -> Tensor | None:
    present = [values[c] for values, (_, c) in zip(logprobs, items, strict=True) if values is not None]
    assert len(present) in (0, len(items)), "log-probs of some groups are missing"
    return torch.cat(present) if present else None


def _scores(group: PromptGroup) -> GroupScores:
    assert group.scores is not None, "groups are scored before they are dealt out"
    return group.scores


def _is_trained(group: PromptGroup, completion: int) -> bool:
    return bool(_scores(group).trained[completion])


def _tokens(groups: Sequence[PromptGroup], items: Sequence[Item]) -> int:
    return sum(len(groups[g].completions[c]) for g, c in items)


def _assignment(items: Sequence[Item]) -> Assignment:
    return [(g, [c for _, c in part]) for g, part in groupby(items, key=lambda item: item[0])]
