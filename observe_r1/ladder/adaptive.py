"""A curriculum that follows the policy: samples are drawn by their current pass rate instead of in a fixed order.

The dynamic weight of the recipe scales the advantages of a group by 4·p·(1−p), so groups of pass rate 0 or 1 cost their
rollouts and teach nothing. Here the same number decides beforehand how likely a sample is to be drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

LEVELS = 9  # difficulties are eighths: 0, 1/8 … 1
UNKNOWN = LEVELS  # the level of samples whose difficulty was never measured

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class AdaptiveOptions:
    """How pass rates are estimated and what is drawn by them.

    Args:
        by: `level` estimates the pass rate of each difficulty level (the nearest eighth; unknown is one, too);
            `sample` that of every sample as well, starting from its level's.
        half_life: Rollouts with samples of a level after which an observation counts half. For a sample, rollouts that
            it was part of.
        prior: What is known beforehand counts like this many completions: the ladder's difficulty for a level, the rate
            of the level for a sample.
        floor: Smallest weight, where 1 is that of pass rate ½: what seems solved or hopeless is tried now and then.
    """

    by: Literal["level", "sample"] = "level"
    half_life: float = 8.0
    prior: float = 8.0
    floor: float = 0.05

    def __post_init__(self) -> None:
        if self.by not in ("level", "sample"):
            raise ValueError(f"adaptive.by is {self.by!r}; choose level or sample.")
        if self.half_life <= 0 or self.prior <= 0 or not 0 < self.floor <= 1:
            raise ValueError(
                f"adaptive.half_life is {self.half_life}, adaptive.prior {self.prior} and adaptive.floor {self.floor}: "
                "the first two are greater than 0, the floor is, too, and at most 1."
            )


class AdaptiveCurriculum:
    """Pass rates of a ladder as the policy has them now, and samples drawn by them.

    Every rank holds the same numbers and draws the same samples.

    Args:
        difficulties: Of each position, 1 − pass rate when the ladder was built; NaN where unknown, which counts as ½.
        options: How pass rates are estimated.
    """

    def __init__(self, difficulties: Numbers, options: AdaptiveOptions) -> None:
        self.options = options
        known = np.nan_to_num(np.clip(difficulties, 0.0, 1.0))
        self._levels = np.where(np.isnan(difficulties), UNKNOWN, np.rint(known * (LEVELS - 1))).astype(np.uint8)
        rates = np.array([*(1 - level / (LEVELS - 1) for level in range(LEVELS)), 0.5])
        self._level_total = np.full(LEVELS + 1, float(options.prior))
        self._level_correct = options.prior * rates
        self._usable = np.ones(len(difficulties), dtype=bool)
        of_samples = len(difficulties) if options.by == "sample" else 0
        self._total = np.zeros(of_samples)
        self._correct = np.zeros(of_samples)

    def pass_rates(self) -> Numbers:
        """The estimate for every position."""
        rates: Numbers = (self._level_correct / self._level_total)[self._levels]
        if self.options.by == "sample":
            rates = (self._correct + self.options.prior * rates) / (self._total + self.options.prior)
        return rates

    def weights(self) -> Numbers:
        """How likely each position is to be drawn, relative to the others: 4·p·(1−p), or the floor."""
        rates = self.pass_rates()
        return np.where(self._usable, np.maximum(4 * rates * (1 - rates), self.options.floor), 0.0)

    def draw(self, count: int, seed: Sequence[int]) -> list[int]:
        """`count` different positions in random order; fewer where there are no more that can be used.

        One after the other is drawn in proportion to its weight among what is left: the first to ring of exponential
        clocks with these rates.
        """
        weights = self.weights()
        count = min(count, int(np.count_nonzero(weights)))
        if count == 0:
            return []
        clocks = np.random.default_rng(np.random.SeedSequence(seed)).standard_exponential(len(weights))
        with np.errstate(divide="ignore"):
            clocks /= weights
        first = np.argpartition(clocks, count - 1)[:count]
        drawn: list[int] = first[np.argsort(clocks[first], kind="stable")].tolist()
        return drawn

    def observe(self, positions: Sequence[int], correct: Numbers, total: Numbers, unusable: Numbers) -> None:
        """Takes in what came of some samples: correct and judged completions of each, and whether it was unusable."""
        places = np.array(positions, dtype=np.int64)
        self._usable[places[unusable > 0]] = False
        seen = total > 0
        places, correct, total = places[seen], correct[seen], total[seen]
        kept = 0.5 ** (1 / self.options.half_life)
        levels = self._levels[places]
        observed = np.unique(levels)
        for counts, new in ((self._level_correct, correct), (self._level_total, total)):
            counts[observed] *= kept
            np.add.at(counts, levels, new)
        if self.options.by == "sample":
            for counts, new in ((self._correct, correct), (self._total, total)):
                counts[np.unique(places)] *= kept
                np.add.at(counts, places, new)

    def state_dict(self) -> dict[str, Any]:
        seen = np.flatnonzero(self._total)
        return {
            "levels": torch.from_numpy(np.stack([self._level_correct, self._level_total])),
            "seen": torch.from_numpy(seen),
            "samples": torch.from_numpy(np.stack([self._correct[seen], self._total[seen]])),
            "unusable": np.flatnonzero(~self._usable).tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._level_correct, self._level_total = state["levels"].numpy().copy()
        self._usable[:] = True
        self._usable[state["unusable"]] = False
        self._correct[:], self._total[:] = 0.0, 0.0
        if self.options.by == "sample":
            self._correct[state["seen"].numpy()], self._total[state["seen"].numpy()] = state["samples"].numpy()
