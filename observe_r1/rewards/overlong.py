"""The penalty for completions near the length limit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from observe_r1.rewards.base import Reward

if TYPE_CHECKING:
    from observe_r1.experience import Completion, Prompt


class OverlongPenalty(Reward):
    """Soft overlong punishment of DAPO (arXiv 2503.14476), equation 13.

    0 up to `max_length - buffer` tokens, then linear down to -1 at `max_length`, and -1 beyond.

    Args:
        max_length: tokens of the longest completion, usually the generation limit.
        buffer: tokens before `max_length` over which the penalty grows.
        weight: factor of the penalty in the combined reward.
        name: key of the score in logs.
    """

    def __init__(self, max_length: int, buffer: int, weight: float = 1.0, name: str | None = "overlong") -> None:
        super().__init__(weight, name)
        if max_length <= 0:
            raise ValueError(f"max_length is {max_length}; give the generation limit in tokens, such as 8192")
        if not 0 < buffer <= max_length:
            raise ValueError(f"buffer is {buffer}; give a number of tokens from 1 to max_length = {max_length}")
        self.max_length = max_length
        self.buffer = buffer

    def score(self, prompt: Prompt, completion: Completion) -> float:
        into_buffer = len(completion) - (self.max_length - self.buffer)
        return -min(max(into_buffer, 0), self.buffer) / self.buffer
