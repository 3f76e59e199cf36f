"""Counts of right answers, overall and in every breakdown, with their intervals. Integers; exact by construction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt

from observe_r1.evaluation.item import Item, Outcome

NORMAL_95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution


def wilson_interval(correct: int, total: int, quantile: float = NORMAL_95) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927), by default of 95 %: within [0, 1], and sound for small counts.

    (p + z²/2n ± z √(p(1 - p)/n + z²/4n²)) / (1 + z²/n) with p = correct / total, n = total, z the quantile.

    Raises:
        ValueError: Nothing was counted, or more than there was.
    """
    if not 0 <= correct <= total or total < 1:
        raise ValueError(f"{correct} right of {total}: an interval needs at least one answer, and not more right ones")
    share, square = correct / total, quantile**2
    centre = share + square / (2 * total)
    half = quantile * sqrt(share * (1 - share) / total + square / (4 * total**2))
    scale = 1 + square / total
    # rounding may leave the bounds a hair away from 0 and 1, where they are exact
    low = 0.0 if correct == 0 else (centre - half) / scale
    high = 1.0 if correct == total else (centre + half) / scale
    return low, high


@dataclass(frozen=True)
class Tally:
    """Right answers among all."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson interval of 95 %."""
        return wilson_interval(self.correct, self.total)

    def to_json(self) -> dict[str, float]:
        low, high = self.interval
        return {"accuracy": self.accuracy, "correct": self.correct, "total": self.total, "low": low, "high": high}


Breakdowns = dict[str, dict[str, Tally]]
"""By name of the breakdown, then by its value: `breakdowns["task"]["math word problem"]`."""


def tally(outcomes: Iterable[Outcome]) -> Tally | None:
    """Of the questions that were answered; None where there are none."""
    answered = [outcome for outcome in outcomes if outcome is not Outcome.UNANSWERED]
    return Tally(answered.count(Outcome.RIGHT), len(answered)) if answered else None


def break_down(items: Sequence[Item], outcomes: Sequence[Outcome]) -> Breakdowns:
    """A tally for every value of every breakdown, best first as the official reports have them.

    A question with several values (`skills`) counts once in each of them. Unanswered questions count nowhere.
    """
    members: dict[str, dict[str, list[Outcome]]] = {}
    for item, outcome in zip(items, outcomes, strict=True):
        for group, values in item.groups.items():
            for value in dict.fromkeys(values):
                members.setdefault(group, {}).setdefault(value, []).append(outcome)
    result: Breakdowns = {}
    for group, by_value in members.items():
        tallies = {value: counted for value, found in by_value.items() if (counted := tally(found)) is not None}
        if tallies:
            result[group] = dict(sorted(tallies.items(), key=lambda entry: -entry[1].accuracy))
    return result
