"""Figures over time: the mean of the last few, the best there was, and how much they scatter."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from itertools import pairwise

from observe_r1.health.rule import Figures, Memory

HISTORY = 30  # values whose scatter is looked at


@dataclass(frozen=True)
class Trend:
    """Where a series is."""

    recent: float  # mean of the last window
    best: float  # largest mean of a window so far
    first: float  # mean of the first window
    noise: float  # standard error of the mean of a window
    best_at: int  # number of values when the best window ended
    count: int

    @property
    def fall(self) -> float:
        """From the best window to the last one."""
        return self.best - self.recent


def follow(memory: Memory, key: str, value: float, window: int) -> Trend | None:
    """Adds a value to the series under `key`; None until there is a window of values, and where the value is no number.

    Noise is estimated from differences of neighbours, so that a trend does not count as noise.
    """
    series = memory.setdefault(key, {"values": [], "count": 0, "best": None, "first": None, "best_at": 0})
    if math.isfinite(value):
        series["values"] = [*series["values"], value][-max(HISTORY, window) :]
        series["count"] += 1
    values: list[float] = series["values"]
    if len(values) < window:
        return None
    recent = statistics.fmean(values[-window:])
    if series["first"] is None:
        series["first"] = recent
    if series["best"] is None or recent > series["best"]:
        series["best"], series["best_at"] = recent, series["count"]
    steps = [later - earlier for earlier, later in pairwise(values)]
    scatter = math.sqrt(statistics.fmean(step * step for step in steps) / 2) if steps else 0.0
    return Trend(
        recent, series["best"], series["first"], scatter / math.sqrt(window), series["best_at"], series["count"]
    )


def follow_figure(figures: Figures, memory: Memory, name: str, window: int) -> Trend | None:
    """`follow` for a figure under its own name; None also where it was not measured this time."""
    return follow(memory, name, figures[name], window) if name in figures else None
