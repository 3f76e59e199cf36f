"""What goes wrong with completions: rewarded for the wrong thing, all alike, too short, too long."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import ClassVar

from observe_r1.health.rule import Figures, Limit, Memory, Reading, Rule, ShareOfStart
from observe_r1.health.trends import follow, follow_figure

SIGMAS = 3.0  # a change has to be this many standard errors
LEVELS = "pass_rate_by_level/"
PARTS = "reward/"


@dataclass(frozen=True)
class RewardHacking(Rule):
    """A part of the reward rises while fewer answers are correct, in training or on held-out questions.

    Held-out questions decide while their last pass rate is recent. Without one it is that of training, compared at the
    same difficulty, so that harder questions of the curriculum are no fall.

    Args:
        fall: How far the pass rate on held-out questions has to be below its best; 0.1 is beyond chance on 200.
        fall_in_training: The same for the pass rate of training, which moves with the kinds of questions in a rollout.
        rise: How much a part of the reward has to grow, as a share of its own largest mean.
        window: Rollouts over which figures are averaged.
        recent: Rollouts for which a validation decides.
    """

    name: ClassVar[str] = "reward_hacking"
    advice: ClassVar[str] = (
        "Read the completions with the highest reward (completions/*.png): they earn it without being right. Lower the "
        "weight of that reward, let it pay only for correct answers, or raise model.kl.coefficient; go on from a "
        "checkpoint before the fall."
    )
    fall: float = 0.1
    fall_in_training: float = 0.2
    rise: float = 0.05
    window: int = 5
    recent: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 2 or not 0 < self.fall < 1 or not 0 < self.fall_in_training < 1 or self.rise < 0:
            raise ValueError(
                f"health.{self.name}: window is {self.window} (valid: 2 and up), fall {self.fall} and fall_in_training "
                f"{self.fall_in_training} (between 0 and 1), rise {self.rise} (0 and up)."
            )

    def read(self, figures: Figures, memory: Memory) -> Reading | None:
        if "val/pass_rate" in figures:
            trend = follow(memory, "val/pass_rate", figures["val/pass_rate"], 1)
            memory["held_out"] = None if trend is None else {"fall": trend.fall, "rollouts": 0}
            return None
        if "rollout/pass_rate" not in figures:
            return None
        in_training, noise = self._fall(figures, memory)
        culprit = self._rising_part(figures, memory)
        held_out = memory.get("held_out")
        if held_out is not None:
            held_out["rollouts"] += 1
        if held_out is not None and held_out["rollouts"] <= self.recent:
            fall, limit, where = held_out["fall"], self.fall, "on held-out questions"
        elif in_training is not None:
            fall, limit, where = in_training, max(self.fall_in_training, SIGMAS * noise), "at the same difficulty"
        else:
            return None
        name, before, now = culprit or ("no part of the reward", math.nan, math.nan)
        return Reading(
            fall > limit and culprit is not None,
            fall < limit / 2,
            f"{name} went from {before:.3g} to {now:.3g} in the last rollouts, while the pass rate is {fall:.2f} "
            f"below its best {where}",
        )

    def _fall(self, figures: Figures, memory: Memory) -> tuple[float | None, float]:
        """Of the pass rate from its best, with the standard error: the mean over the levels of this rollout."""
        levels = [name for name in figures if name.startswith(LEVELS)] or ["rollout/pass_rate"]
        found = [follow(memory, name, figures[name], self.window) for name in levels]
        trends = [trend for trend in found if trend is not None]
        if not trends:
            return None, 0.0
        noise = math.sqrt(math.fsum(trend.noise**2 for trend in trends)) / len(trends)
        return statistics.fmean(trend.fall for trend in trends), noise

    def _rising_part(self, figures: Figures, memory: Memory) -> tuple[str, float, float] | None:
        """The part that grew most for its scatter over the remembered rollouts, with its mean before and now."""
        rising: list[tuple[float, str, float, float]] = []
        for name in (name for name in figures if name.startswith(PARTS)):
            trend = follow(memory, name, figures[name], self.window)
            values: list[float] = memory[name]["values"]
            if trend is None or len(values) < 2 * self.window:
                continue
            before = statistics.fmean(values[: self.window])
            growth, scale = trend.recent - before, max(map(abs, values))
            if growth > max(self.rise * scale, SIGMAS * trend.noise):
                rising.append((growth / (trend.noise + 1e-12), name, before, trend.recent))
        return max(rising)[1:] if rising else None


@dataclass(frozen=True)
class Templated(Limit):
    """The same completion to different questions.

    Args:
        above: Share of completions of a rollout that are the most frequent one, word for word.
        window: Rollouts over which it is averaged.
    """

    name: ClassVar[str] = "templated_completions"
    advice: ClassVar[str] = (
        "The policy has stopped to look at the question. Look at the completions and at which part of the reward still "
        "pays for them; a smaller learning rate, a larger model.kl.coefficient or model.objective.epsilon_high keep "
        "answers apart."
    )
    above: float = 0.5  # half of all answers are one: no data set asks the same question that often
    well_below: float = 0.4
    window: int = 5

    def read(self, figures: Figures, memory: Memory) -> Reading | None:
        trend = follow_figure(figures, memory, "rollout/repeated", self.window)
        if trend is None:
            return None
        return self.compare(
            trend.recent, f"{trend.recent:.0%} of the completions of the last rollouts are one and the same"
        )


@dataclass(frozen=True)
class LengthCollapse(ShareOfStart):
    """Completions become far shorter than they were.

    Args:
        below: Share of the length at the start; the bonus for concise answers alone stays well above.
        well_above: And well again above this.
        window: Rollouts over which lengths are averaged.
    """

    name: ClassVar[str] = "length_collapse"
    advice: ClassVar[str] = (
        "Reasoning is being left out. Lower model.advantage.bonus or raise bonus_above_tokens, and look for a reward "
        "that pays for brevity whether or not the answer is right."
    )
    below: float = 0.4
    well_above: float = 0.5
    window: int = 5

    def read(self, figures: Figures, memory: Memory) -> Reading | None:
        trend = follow_figure(figures, memory, "rollout/length", self.window)
        if trend is None:
            return None
        share = self.share(trend.recent, trend.first)
        evidence = f"{trend.recent:.1f} tokens to a completion, {share:.0%} of the {trend.first:.1f} at the start"
        return Reading(share < self.below, share > self.well_above, evidence)


@dataclass(frozen=True)
class LengthExplosion(Limit):
    """Many completions are cut by the length limit before they have answered.

    Args:
        above: Share of completions that are cut; each of them costs the most and can hardly be right.
        window: Rollouts over which it is averaged.
    """

    name: ClassVar[str] = "length_explosion"
    advice: ClassVar[str] = (
        "If answers are unfinished, raise model.sampling.max_new_tokens; if they ramble, set model.filtering.overlong "
        "to mask or add observe_r1.rewards.OverlongPenalty, and look for a reward that pays for length."
    )
    above: float = 0.25
    well_below: float = 0.15
    window: int = 5

    def read(self, figures: Figures, memory: Memory) -> Reading | None:
        trend = follow_figure(figures, memory, "rollout/truncated", self.window)
        length = figures.get("rollout/length", math.nan)
        if trend is None:
            return None
        return self.compare(
            trend.recent,
            f"{trend.recent:.0%} of the completions are cut by the limit, mean length {length:.0f} tokens",
        )
