"""The reward for the form of a completion."""

from __future__ import annotations

from typing import TYPE_CHECKING

from observe_r1.answers import is_well_formed
from observe_r1.rewards.base import Reward

if TYPE_CHECKING:
    from observe_r1.experience import Completion, Prompt


class FormatReward(Reward):
    """1 for a completion with well-formed `<observe>`, `<think>` and `<answer>` blocks, else 0 (`is_well_formed`).

    Args:
        weight: 0.5 in Observe-R1 (arXiv 2505.12432).
        name: key of the score in logs.
    """

    def __init__(self, weight: float = 0.5, name: str | None = None) -> None:
        super().__init__(weight, name)

    def score(self, prompt: Prompt, completion: Completion) -> float:
        return float(is_well_formed(completion.text))
