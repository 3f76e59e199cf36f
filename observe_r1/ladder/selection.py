"""Which measured questions stay in a ladder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from observe_r1.ladder.measurement import Measurement


@dataclass(frozen=True)
class LabelNoiseOptions:
    """Questions whose gold is probably wrong: hard, and yet answered in few words.

    The paper says that samples of low complexity and high difficulty are left out, which can be read in two ways, and
    gives no thresholds.

    Args:
        drop: `both`: what is hard and answered briefly at the same time; `either`: what is hard, and what is answered
            briefly; `none`: nothing. The paper's own chart has a fifth of its samples at difficulty 1, which `either`
            with a threshold of 1 would not leave.
        difficulty: Hard is this difficulty or more.
        complexity_quantile: Brief is less than this quantile of the mean lengths of all questions.
        complexity_tokens: Brief is less than this mean length, in place of the quantile.
    """

    drop: Literal["both", "either", "none"] = "both"
    difficulty: float = 1.0
    complexity_quantile: float = 0.1
    complexity_tokens: float | None = None

    def __post_init__(self) -> None:
        for name in ("difficulty", "complexity_quantile"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"label_noise.{name} is {getattr(self, name)}; it lies in 0 … 1")

    def threshold(self, measurements: Sequence[Measurement]) -> float:
        """Mean tokens below which answers are brief."""
        if self.complexity_tokens is not None:
            return self.complexity_tokens
        lengths = [measurement.complexity for measurement in measurements]
        return float(np.quantile(lengths, self.complexity_quantile)) if lengths else 0.0


def noise_reasons(measurements: Sequence[Measurement], options: LabelNoiseOptions) -> list[str | None]:
    """Why each question is left out, None for those that stay."""
    if options.drop == "none":
        return [None] * len(measurements)
    threshold = options.threshold(measurements)
    reasons: list[str | None] = []
    for measurement in measurements:
        hard = measurement.difficulty >= options.difficulty
        brief = measurement.complexity < threshold
        if options.drop == "both":
            reasons.append("hard_and_brief" if hard and brief else None)
        else:
            reasons.append("hard" if hard else "brief" if brief else None)
    return reasons
