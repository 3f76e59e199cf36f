"""What rollouts say about a question: how hard it is, and how much has to be said to answer it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Measurement:
    """Judged responses to one question. At least one of them."""

    n_correct: int
    lengths: Sequence[int]  # of the responses, in tokens

    @property
    def n_rollouts(self) -> int:
        return len(self.lengths)

    @property
    def difficulty(self) -> float:
        """1 − pass rate."""
        return 1 - self.n_correct / self.n_rollouts

    @property
    def complexity(self) -> float:
        """Mean length of a response in tokens."""
        return sum(self.lengths) / self.n_rollouts

    def fields(self) -> dict[str, Any]:
        """As prompts and samples hold them."""
        return {
            "difficulty": self.difficulty,
            "complexity": self.complexity,
            "n_correct": self.n_correct,
            "n_rollouts": self.n_rollouts,
        }
