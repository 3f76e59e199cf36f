"""Several rewards as one: weighted sums beside the parts and the correctness they come from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING

from observe_r1.rewards.base import CorrectnessReward, Reward

if TYPE_CHECKING:
    from observe_r1.experience import PromptGroup


@dataclass(frozen=True)
class CombinedScores:
    """How the G completions of one group were scored."""

    parts: dict[str, list[float]]  # [G] by reward name, before the weight
    reward: list[float]  # [G] weighted sum of the parts
    correct: list[bool]  # [G] False where `judged` is False
    judged: list[bool]  # [G] False: the gold answer cannot be compared with, leave the completion out of the loss


class RewardCombination:
    """Scores groups with every reward and keeps correctness apart from the weighted sum.

    Args:
        rewards: exactly one `CorrectnessReward`, and any number of others with names of their own.

    Raises:
        ValueError: without exactly one `CorrectnessReward`, or when two rewards share a name.
    """

    def __init__(self, rewards: Sequence[Reward]) -> None:
        self.rewards = list(rewards)
        judges = [reward for reward in self.rewards if isinstance(reward, CorrectnessReward)]
        if len(judges) != 1:
            found = ", ".join(type(reward).__name__ for reward in self.rewards) or "no rewards"
            raise ValueError(
                f"model.rewards: of the rewards ({found}), {len(judges)} decide what is correct, and exactly one must: "
                "the pass rate comes from it. Use `accuracy: observe_r1.rewards.AccuracyReward` once, and derive "
                "others from Reward"
            )
        self.correctness = judges[0]
        names = Counter(reward.name for reward in self.rewards)
        shared = [name for name, count in names.items() if count > 1]
        if shared:
            raise ValueError(f"rewards share the name {shared[0]!r}: give each reward a `name` of its own")

    @classmethod
    def named(cls, rewards: Mapping[str, Reward]) -> RewardCombination:
        """The combination of rewards that take the names of their keys."""
        for name, reward in rewards.items():
            reward.name = name
        return cls(list(rewards.values()))

    def setup(self) -> None:
        """Sets every reward up."""
        for reward in self.rewards:
            reward.setup()

    def score(self, groups: Sequence[PromptGroup]) -> list[CombinedScores]:
        """One `CombinedScores` per group, in order.

        Raises:
            ValueError: when a reward returns another number of scores than there are completions.
        """
        verdicts = self.correctness.judge_groups(groups)
        self._check_sizes(self.correctness, groups, verdicts)
        parts: dict[str, list[list[float]]] = {}
        for reward in self.rewards:
            if reward is self.correctness:
                scores = [[1.0 if verdict else 0.0 for verdict in group] for group in verdicts]
            else:
                scores = self._scores_of(reward, groups)
            parts[reward.name] = scores
        return [
            self._combine({name: scores[i] for name, scores in parts.items()}, verdicts[i]) for i in range(len(groups))
        ]

    def _scores_of(self, reward: Reward, groups: Sequence[PromptGroup]) -> list[list[float]]:
        try:
            scores = reward.score_groups(groups)
        except Exception as error:
            error.add_note(f"raised by reward {reward.name!r} ({type(reward).__name__})")
            raise
        self._check_sizes(reward, groups, scores)
        wrong = next((value for group in scores for value in group if not math.isfinite(value)), None)
        if wrong is not None:
            raise ValueError(f"reward {reward.name!r} gave a score of {wrong!r}; a score must be a finite number")
        return scores

    def _combine(self, parts: dict[str, list[float]], verdicts: Sequence[bool | None]) -> CombinedScores:
        return CombinedScores(
            parts=parts,
            reward=[
                sum(reward.weight * parts[reward.name][i] for reward in self.rewards) for i in range(len(verdicts))
            ],
            correct=[verdict is True for verdict in verdicts],
            judged=[verdict is not None for verdict in verdicts],
        )

    @staticmethod
    def _check_sizes(reward: Reward, groups: Sequence[PromptGroup], scores: Sequence[Sequence[object]]) -> None:
        expected = [len(group.completions) for group in groups]
        found = [len(group) if isinstance(group, Sized) else group for group in (() if scores is None else scores)]
        if found != expected:
            raise ValueError(
                f"reward {reward.name!r} returned {found} scores per group for {expected} completions; give a list for "
                "every group, with a number for every completion"
            )

    def take_counts(self) -> Counter[str]:
        """The verdict counts of the correctness reward since the last call."""
        return self.correctness.take_counts()

    def close(self) -> None:
        """Closes every reward."""
        for reward in self.rewards:
            reward.close()
