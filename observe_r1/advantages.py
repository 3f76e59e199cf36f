"""Advantages of one group: concise bonus, group normalisation, dynamic weight.

Pure functions of [G] tensors, in the order in which the recipe applies them. Sources: Observe-R1 (arXiv 2505.12432),
sections on the bonus reward and the dynamic weighting, and the authors' release; GRPO normalisation from DeepSeekMath
(arXiv 2402.03300), without the standard deviation as in Dr. GRPO (arXiv 2503.20783).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

STD_FLOOR = 1e-9  # the release's guard of the division
EQUAL_REWARDS = 1e-6  # rewards closer than this are equal: what is left is the rounding of their sums


@dataclass(frozen=True)
class AdvantageOptions:
    """How rewards of a group become advantages.

    Args:
        scale: `std` divides by the group's standard deviation; `none` only subtracts the mean (Dr. GRPO).
        bonus: Reward added to the shortest correct completion of a group; 0 for none.
        bonus_above_tokens: The bonus is given only if that completion is longer than this many tokens.
        dynamic_weight: σ of the weight 4·σ·p·(1−p); null trains every group with weight 1.
    """

    scale: Literal["std", "none"] = "std"
    bonus: float = 0.2
    bonus_above_tokens: int = 100
    dynamic_weight: float | None = 1.8

    def __post_init__(self) -> None:
        if self.bonus < 0:
            raise ValueError(f"advantage.bonus is {self.bonus}, but a bonus cannot be negative: use 0 for none.")
        if self.dynamic_weight is not None and self.dynamic_weight <= 0:
            raise ValueError(
                f"advantage.dynamic_weight is {self.dynamic_weight}, but σ must be positive: use null to turn it off."
            )


def concise_bonus(correct: Tensor, lengths: Tensor, bonus: float, above_tokens: int) -> Tensor:
    """Bonus [G] of a group: `bonus` for its shortest correct completion, if that is longer than `above_tokens`.

    Args:
        correct: [G] bool.
        lengths: [G] completion lengths in tokens. The first of several shortest wins, as in the release.
    """
    given = torch.zeros(len(correct), dtype=torch.float64)
    if bool(correct.any()):
        shortest = int(torch.where(correct, lengths, lengths.max() + 1).argmin())
        if int(lengths[shortest]) > above_tokens:
            given[shortest] = bonus
    return given


def group_advantages(rewards: Tensor, scale: Literal["std", "none"] = "std") -> Tensor:
    """A = (r − mean) / (std + 1e-9) over the group, [G]; the standard deviation is unbiased (n − 1).

    A group of equal rewards, and a group of one, has advantage exactly 0.
    """
    rewards = rewards.double()
    centred = rewards - rewards.mean()
    if len(rewards) < 2 or float(rewards.max() - rewards.min()) <= EQUAL_REWARDS:
        return torch.zeros_like(rewards)
    return centred if scale == "none" else centred / (rewards.std() + STD_FLOOR)


def dynamic_weight(pass_rate: float, sigma: float) -> float:
    """w = 4·σ·p·(1−p): σ at p = ½, 0 where a group is all right or all wrong."""
    return 4.0 * sigma * pass_rate * (1.0 - pass_rate)
