"""One rollout from prompts to a scored, dealt-out experience: sampling, rewards, advantages, fixed log-probs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from observe_r1.advantages import AdvantageOptions, concise_bonus, dynamic_weight, group_advantages
from observe_r1.experience import EncodedPrompt, Experience, GroupScores, MicroBatch, PromptGroup
from observe_r1.micro_batches import assemble_assignment
from observe_r1.rewards.combination import RewardCombination


@dataclass(frozen=True)
class FilteringOptions:
    """Which groups and completions are trained on.

    Args:
        zero_variance: Groups without any advantage: `keep` them (they count in the denominators), or `refill` (drop
            them and draw further samples of the ladder, as DAPO's dynamic sampling).
        max_refills: How often a rollout is refilled at most.
        overlong: Completions cut by the length limit: `keep`, or `mask` them out of the loss.
    """

    zero_variance: Literal["keep", "refill"] = "keep"
    max_refills: int = 3
    overlong: Literal["keep", "mask"] = "keep"

    def __post_init__(self) -> None:
        if self.max_refills < 0:
            raise ValueError(f"filtering.max_refills is {self.max_refills}: use 0 or more.")


class PromptSource(Protocol):
    """Where a rollout draws its prompts from, in curriculum order."""

    epoch: int
    position: int  # of the next sample, on all ranks the same

    def draw(self, count: int) -> list[EncodedPrompt]:
        """This rank's share of the next `count` samples; fewer where samples are skipped or the ladder ends."""
        ...


def rollout_seed(seed: int, epoch: int, position: int, rank: int) -> int:
    """Seed of the sampling of one rollout. Depends on nothing that a resumed run does not know."""
    return int(np.random.SeedSequence([seed, epoch, position, rank]).generate_state(1)[0])


def score_groups(
    groups: Sequence[PromptGroup],
    rewards: RewardCombination,
    advantage: AdvantageOptions,
    overlong: Literal["keep", "mask"],
) -> None:
    """Fills in the scores of every group: rewards, concise bonus, advantages, dynamic weight."""
    for group, combined in zip(groups, rewards.score(groups), strict=True):
        correct = torch.tensor(combined.correct, dtype=torch.bool)
        judged = torch.tensor(combined.judged, dtype=torch.bool)
        lengths = torch.tensor([len(completion) for completion in group.completions])
        truncated = torch.tensor([completion.truncated for completion in group.completions])
        reward = torch.tensor(combined.reward, dtype=torch.float64)
        bonus = concise_bonus(correct, lengths, advantage.bonus, advantage.bonus_above_tokens)
        reward = reward + bonus
        weight = 1.0
        if advantage.dynamic_weight is not None:
            weight = dynamic_weight(float(correct.double().mean()), advantage.dynamic_weight)
        trained = judged if overlong == "keep" else judged & ~truncated
        # a gold that cannot be judged says nothing about any answer of the group
        values = group_advantages(reward, advantage.scale) * weight * float(judged.all())
        parts = {name: torch.tensor(part, dtype=torch.float32) for name, part in combined.parts.items()}
        group.scores = GroupScores(
            parts={**parts, "bonus": bonus.float()},
            reward=reward.float(),
            correct=correct,
            trained=trained,
            advantage=values.float(),
            weight=weight,
        )


def has_advantage(group: PromptGroup) -> bool:
    """Whether anything can be learned from the group."""
    return group.scores is not None and bool((group.scores.advantage * group.scores.trained).any())


def store_logprobs(
    experience: Experience,
    field: Literal["old_logprobs", "reference_logprobs"],
    logprobs_of: Callable[[MicroBatch], Tensor],
) -> None:
    """Computes log-probs of every completion that will be trained and stores them on its group.

    Runs micro-batch by micro-batch as they will be trained: with another packing, half precision would move the ratio
    off 1 before the first step.
    """
    filled: list[list[Tensor]] = [
        [torch.zeros(len(completion)) for completion in group.completions] for group in experience.groups
    ]
    done: set[tuple[int, int]] = set()
    for step in experience.steps:
        for assignment in step.micro_batches:
            items = [(g, c) for g, completions in assignment for c in completions]
            if done.issuperset(items):  # a later epoch over the same rollout
                continue
            batch = assemble_assignment(experience.groups, assignment, step)
            values = logprobs_of(batch).float().cpu().split(batch.lengths.tolist())
            for (g, c), value in zip(items, values, strict=True):
                filled[g][c] = value
            done.update(items)
    for group, values_of_group in zip(experience.groups, filled, strict=True):
        setattr(group, field, values_of_group)
