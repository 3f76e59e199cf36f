"""Scores of completions and the advantages that follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from observe_r1.advantages import AdvantageOptions, concise_bonus, dynamic_weight, group_advantages
from observe_r1.experience import GroupScores, PromptGroup
from observe_r1.rewards.combination import RewardCombination


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
            judged=judged,
            trained=trained,
            advantage=values.float(),
            weight=weight,
        )


def has_advantage(group: PromptGroup) -> bool:
    """Whether anything can be learned from the group."""
    return group.scores is not None and bool((group.scores.advantage * group.scores.trained).any())
