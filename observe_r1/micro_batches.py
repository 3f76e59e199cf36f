"""The micro-batches of each optimizer step of a rollout, and the tensors of one, which `training_step` reads."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from observe_r1.balancing import Item, cost_of
from observe_r1.dealing import RankPlan, deal, scores_of, work_of
from observe_r1.experience import (
    Assignment,
    Experience,
    GroupSlice,
    MicroBatch,
    OptimizerStep,
    PromptGroup,
    StepTotals,
)
from observe_r1.token_cost import TokenCost


def deal_steps(
    groups: Sequence[PromptGroup],
    *,
    steps: int,
    epochs: int,
    micro_batches: int,
    skip_zero_advantage: bool,
    cost: TokenCost,
) -> list[OptimizerStep]:
    """The optimizer steps of a rollout on one rank alone.

    Args:
        steps: Blocks of whole groups in curriculum order, passed over `epochs` times.
        micro_batches: Of every step, of about equal cost, the dearest first, none of them empty: where a step has too
            little to train on, micro-batches that count nothing fill in.
        skip_zero_advantage: Completions with advantage 0 do not pass through the model. Only right when nothing else
            gives them a gradient (no KL); they still count in the totals, so the loss is the same.
        cost: Of a completion and of its prompt, which every micro-batch with completions of the group pays.

    Raises:
        ValueError: There are no groups.
    """
    plan = deal([[work_of(group, cost, skip_zero_advantage) for group in groups]], steps, micro_batches)
    return optimizer_steps(plan, 0, groups, plan.sums, micro_batches, cost) * epochs


def optimizer_steps(
    plan: RankPlan, rank: int, groups: Sequence[PromptGroup], sums: Tensor, micro_batches: int, cost: TokenCost
) -> list[OptimizerStep]:
    """What one rank of a plan does.

    Args:
        groups: Of this rank. Those that the plan gives it beside them are numbered behind them.
        sums: [steps, 3] those of the plan, over all ranks.
        micro_batches: Of every step.
    """
    numbers = {g: place for g, (owner, place) in enumerate(plan.owners) if owner == rank}
    numbers |= {g: len(groups) + place for place, g in enumerate(plan.received(rank))}
    filler = _filler(groups, cost)
    dealt = []
    for batches, of_step in zip(plan.batches[rank], sums.tolist(), strict=True):
        # a step in which nothing is trained has loss 0; its denominator only has to be finite
        totals = StepTotals(*(max(value, 1.0) for value in of_step))
        assignments = [_assignment([(numbers[g], c) for g, c in batch]) for batch in batches]
        assignments += [filler] * (micro_batches - len(batches))
        dealt.append(OptimizerStep(assignments, totals, frozenset(range(len(batches), micro_batches))))
    return dealt


def _filler(groups: Sequence[PromptGroup], cost: TokenCost) -> Assignment:
    """The cheapest completion."""
    if not groups:
        raise ValueError("A rollout without any prompt cannot be trained on: every sample of it was skipped.")
    costs = [
        cost.group(group.prompt.token_ids.numel(), group.prompt.tower_patches, [len(c) for c in group.completions])
        for group in groups
    ]
    everything = [(g, c) for g, group in enumerate(groups) for c in range(len(group.completions))]
    return _assignment([min(everything, key=lambda item: (cost_of(costs, [item]), item))])


def assemble(experience: Experience, number: int) -> MicroBatch:
    """Micro-batch `number` of a rollout, counted over all its optimizer steps."""
    index = number
    for step in experience.steps:
        if index < len(step.micro_batches):
            break
        index -= len(step.micro_batches)
    else:
        raise IndexError(f"micro-batch {number} of a rollout that has {len(experience)}")
    return assemble_step(experience.trained_groups, step, index)


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
        advantages=torch.stack([scores_of(groups[g]).advantage[c] for g, c in items]).float(),
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


def _is_trained(group: PromptGroup, completion: int) -> bool:
    return bool(scores_of(group).trained[completion])


def _assignment(items: Sequence[Item]) -> Assignment:
    return [(g, [c for _, c in part]) for g, part in groupby(items, key=lambda item: item[0])]
