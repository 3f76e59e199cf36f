"""What a reward is: a named, weighted score of each completion."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from observe_r1.experience import Completion, Prompt, PromptGroup


class Reward(ABC):
    """A score for completions. Subclasses implement `score`, or `score_groups` where a whole batch is cheaper.

    Args:
        weight: factor of this score in the combined reward.
        name: key of the score in logs; by default the class name without `Reward`, in snake case.
    """

    def __init__(self, weight: float = 1.0, name: str | None = None) -> None:
        if not math.isfinite(weight):
            raise ValueError(f"weight of {type(self).__name__} is {weight}; give a finite number")
        self.weight = weight
        self.name = name or _snake_case(type(self).__name__.removesuffix("Reward") or type(self).__name__)

    @abstractmethod
    def score(self, prompt: Prompt, completion: Completion) -> float:
        """The score of one completion before the weight."""

    def score_groups(self, groups: Sequence[PromptGroup]) -> list[list[float]]:
        """Scores before the weight, one list per group, one number per completion.

        Raises:
            ValueError: when `score` returns anything but a finite number.
        """
        return [
            [self._checked(group, self.score(group.prompt.prompt, completion)) for completion in group.completions]
            for group in groups
        ]

    def _checked(self, group: PromptGroup, value: float) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(
                f"reward {self.name!r} scored a completion of prompt {group.prompt.prompt.id!r} with {value!r}; "
                "a score must be a finite number"
            )
        return number

    def setup(self) -> None:  # noqa: B027  most rewards need nothing
        """Called once before the first batch."""

    def close(self) -> None:  # noqa: B027  most rewards hold nothing
        """Called once after the last batch; releases what the reward holds."""


class CorrectnessReward(Reward):
    """The reward that decides which completions are correct: 1 for a right answer, 0 for any other.

    Args:
        weight: factor of the score in the combined reward.
        name: key of the score in logs.

    Attributes:
        counts: how often each verdict fell since the last `take_counts`.
    """

    def __init__(self, weight: float = 1.0, name: str | None = None) -> None:
        super().__init__(weight, name)
        self.counts: Counter[str] = Counter()

    @abstractmethod
    def judge_groups(self, groups: Sequence[PromptGroup]) -> list[list[bool | None]]:
        """Whether each completion is correct; None: it cannot be judged and is left out of the loss."""

    def score_groups(self, groups: Sequence[PromptGroup]) -> list[list[float]]:
        return [[1.0 if verdict else 0.0 for verdict in verdicts] for verdicts in self.judge_groups(groups)]

    def take_counts(self) -> Counter[str]:
        """The verdict counts since the last call, which start again at zero."""
        counts, self.counts = self.counts, Counter()
        return counts


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
