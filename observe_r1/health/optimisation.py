"""What goes wrong with the weights: they run away from the reference, freeze, jump, or are no numbers any more."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import ClassVar

from observe_r1.health.rule import Figures, Limit, Memory, Reading, Rule, ShareOfStart
from observe_r1.health.trends import follow_figure


@dataclass(frozen=True)
class KLBlowUp(Limit):
    """The policy is far from the reference model. Needs a KL term; without one nothing is known.

    Args:
        above: k3 estimate in nats per token; useful runs stay below 0.3.
        window: Optimizer steps whose median it is: a single token of a tiny probability can make a mean of 100.
    """

    name: ClassVar[str] = "kl_blow_up"
    advice: ClassVar[str] = (
        "Lower the learning rate (model.optimizer.lr; half or a tenth), raise model.kl.coefficient, lengthen the "
        "warm-up, and go on from a checkpoint before it. What the policy knew before the training is being lost."
    )
    above: float = 1.0
    well_below: float = 0.5
    window: int = 5

    def read(self, figures: Figures, memory: Memory) -> Reading | None:
        if follow_figure(figures, memory, "train/kl", self.window) is None:
            return None
        median = statistics.median(memory["train/kl"]["values"][-self.window :])
        return self.compare(median, f"KL to the reference {median:.2g} nats per token")


@dataclass(frozen=True)
class EntropyCollapse(ShareOfStart):
    """The policy is all but certain of every token, so that the completions of a group are the same.

    Args:
        below: Share of the entropy at the start.
        well_above: And well again above this.
        floor: Only below this many nats per token: a policy that began certain has nothing to lose.
        window: Optimizer steps over which it is averaged.
    """

    name: ClassVar[str] = "entropy_collapse"
    advice: ClassVar[str] = (
        "Nothing is tried out any more, so nothing more will be learned. Raise model.objective.epsilon_high (0.28 as "
        "in DAPO), lower the learning rate, or raise model.kl.coefficient; model.filtering.zero_variance: refill "
        "keeps groups that still differ."
    )
    below: float = 0.1
    well_above: float = 0.2
    floor: float = 0.05
    window: int = 5

    def read(self, figures: Figures, memory: Memory) -> Reading | None:
        trend = follow_figure(figures, memory, "train/entropy", self.window)
        if trend is None:
            return None
        share = self.share(trend.recent, trend.first)
        return Reading(
            share < self.below and trend.recent < self.floor,
            share > self.well_above or trend.recent > self.floor,
            f"entropy {trend.recent:.2g} nats per token, {share:.0%} of the {trend.first:.2g} at the start",
        )


@dataclass(frozen=True)
class GradientSpikes(Rule):
    """Gradient norms far above the usual, again and again. A single one is clipped and forgotten.

    Args:
        factor: A spike is this many times the median.
        spikes: So many among the last `window` steps are sick, and none of them is well.
        window: Optimizer steps in which spikes are counted.
        history: Optimizer steps whose median is the usual norm.
    """

    name: ClassVar[str] = "gradient_spikes"
    advice: ClassVar[str] = (
        "Set trainer.gradient_clip_val (1.0 in the release) if it is not set, lower the learning rate, and look at the "
        "completions of these steps: extreme lengths or log-ratios cause them."
    )
    after: int = 1
    stops: bool = False  # clipped, they pass
    factor: float = 10.0
    spikes: int = 3
    window: int = 20
    history: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor <= 1 or not 1 <= self.spikes <= self.window <= self.history:
            raise ValueError(
                f"health.{self.name}: factor is {self.factor} (valid: above 1), spikes {self.spikes}, window "
                f"{self.window} and history {self.history} (valid: 1 ≤ spikes ≤ window ≤ history)."
            )

    def read(self, figures: Figures, memory: Memory) -> Reading | None:
        norm = figures.get("train/gradient_norm", 0.0)
        if not math.isfinite(norm) or norm == 0.0:  # no figure, or a step without any advantage
            return None
        norms: list[float] = memory.setdefault("norms", [])
        flags: list[bool] = memory.setdefault("spikes", [])
        usual = statistics.median(norms) if len(norms) >= self.window else math.inf
        memory["norms"] = [*norms, norm][-self.history :]
        memory["spikes"] = flags = [*flags, norm > self.factor * usual][-self.window :]
        if flags[-1]:
            memory["largest"] = norm / usual
        count = sum(flags)
        return Reading(
            count >= self.spikes,
            count == 0,
            f"{count} of the last {len(flags)} gradient norms are above {self.factor:g} times the median, the last "
            f"spike {memory.get('largest', 0.0):.0f} times",
        )


NUMBERS = ("train/loss", "train/kl", "train/gradient_norm")


@dataclass(frozen=True)
class NonFinite(Rule):
    """A loss, KL or gradient norm that is nan or infinite: weights that were updated with it are lost."""

    name: ClassVar[str] = "non_finite"
    advice: ClassVar[str] = (
        "Go on from the last checkpoint before it, with a smaller learning rate and trainer.gradient_clip_val; use "
        "bf16 instead of float16; --trainer.detect_anomaly=true finds the operation."
    )
    after: int = 1

    def read(self, figures: Figures, memory: Memory) -> Reading | None:
        found = {name: figures[name] for name in NUMBERS if name in figures}
        wrong = {name: value for name, value in found.items() if not math.isfinite(value)}
        if not found:
            return None
        return Reading(
            bool(wrong), not wrong, ", ".join(f"{name} is {value}" for name, value in wrong.items()) or "finite"
        )
