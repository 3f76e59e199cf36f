"""What a rule of health is: it reads figures and says whether they are sick, well, or neither."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

Figures = Mapping[str, float]
"""What was measured at one moment, by logging name. A rollout, an optimizer step and a validation give theirs apart."""

Memory = dict[str, Any]
"""What a rule keeps from one reading to the next; plain numbers and lists, because it is saved in checkpoints."""


@dataclass(frozen=True)
class Reading:
    """What a rule makes of figures. Between sick and well nothing changes: a figure at its limit warns once."""

    sick: bool
    well: bool
    evidence: str  # the figures, in words


@dataclass(frozen=True)
class Rule(ABC):
    """Looks for one sickness. Options are the fields of the subclass; the rule itself does not change.

    Args:
        after: Readings in a row that have to be sick before there is a warning, and well before it is over.
        stops: With `model.on_sick: stop` the warning ends the run.
    """

    name: ClassVar[str]
    advice: ClassVar[str]
    after: int = 3
    stops: bool = True

    def __post_init__(self) -> None:
        if self.after < 1:
            raise ValueError(f"health.{self.name}.after is {self.after}: use 1 or more readings in a row.")

    @abstractmethod
    def read(self, figures: Figures, memory: Memory) -> Reading | None:
        """What the figures say; None where they say nothing about this sickness, or it is too early to tell."""


@dataclass(frozen=True)
class Limit(Rule):
    """A sickness that is a figure above a limit.

    Args:
        above: The figure is sick above this.
        well_below: And well again below this.
    """

    above: float = math.inf
    well_below: float = math.inf

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.well_below <= self.above:  # turned so that nan is refused
            raise ValueError(
                f"health.{self.name}.above is {self.above} and well_below {self.well_below}: use well_below ≤ above."
            )

    def compare(self, value: float, evidence: str) -> Reading:
        return Reading(value > self.above, value < self.well_below, evidence)


@dataclass(frozen=True)
class ShareOfStart(Rule):
    """A sickness that is a figure below a share of what it was at the start.

    Args:
        below: The figure is sick below this share.
        well_above: And well again above this one.
        window: Readings over which the figure is averaged, at the start and now.
    """

    below: float = 0.1
    well_above: float = 0.2
    window: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.below <= self.well_above:
            raise ValueError(
                f"health.{self.name}.below is {self.below} and well_above {self.well_above}: use 0 < below ≤ "
                "well_above."
            )

    @staticmethod
    def share(now: float, start: float) -> float:
        return now / max(start, 1e-9)
