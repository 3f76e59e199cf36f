"""What goes wrong around the policy: questions that teach nothing, another policy that samples, a judge that fails."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from observe_r1.health.rule import Figures, Limit, Memory, Reading
from observe_r1.health.trends import follow

FAILURES = ("timeout", "out_of_memory", "worker_died", "unparseable_gold")


@dataclass(frozen=True)
class ZeroAdvantages(Limit):
    """Groups whose completions are all right or all wrong, so that nothing is learned from them.

    Args:
        above: Share of the groups of a rollout; more than half is common, four of five is an expensive way to learn.
        window: Rollouts over which it is averaged.
    """

    name: ClassVar[str] = "zero_advantages"
    advice: ClassVar[str] = (
        "Choose questions of medium difficulty: data.order: adaptive, model.filtering.zero_variance: refill, a larger "
        "model.sampling.group_size, or another ladder (`observe-r1 ladder build` measures difficulty)."
    )
    stops: bool = False  # the ladder goes on to other questions
    above: float = 0.8
    well_below: float = 0.7
    window: int = 5

    def read(self, figures: Figures, memory: Memory) -> Reading | None:
        if "rollout/wasted_groups" not in figures:
            return None
        trend = follow(memory, "wasted", figures["rollout/wasted_groups"], self.window)
        passed = follow(memory, "passed", figures.get("rollout/pass_rate", 0.0), self.window)
        if trend is None or passed is None:
            return None
        kind = "too easy" if passed.recent > 0.75 else "too hard" if passed.recent < 0.25 else "too easy or too hard"
        return self.compare(
            trend.recent,
            f"{trend.recent:.0%} of the groups of the last rollouts are all right or all wrong; at a pass rate of "
            f"{passed.recent:.2f} the questions are {kind}",
        )


@dataclass(frozen=True)
class SamplerMismatch(Limit):
    """The engine that samples is another policy than the one that is trained.

    Args:
        above: Mean distance of log-probs per token, on the same tokens; bf16 on both sides stays below 0.02.
    """

    name: ClassVar[str] = "sampler_mismatch"
    advice: ClassVar[str] = (
        "Weights may not reach the sampler (is VLLMWeightSync among the callbacks?), or its precision, image limits or "
        "temperature differ: see docs/vllm.md. Keep model.importance.correction at auto or always meanwhile."
    )
    after: int = 2
    above: float = 0.05
    well_below: float = 0.02

    def read(self, figures: Figures, memory: Memory) -> Reading | None:
        if "rollout/steps_behind" in figures:
            memory["is_current"] = figures["rollout/steps_behind"] == 0
        # of a rollout with older weights only the comparison with new samples says anything
        name = "train/sampler_mismatch" if memory.get("is_current", True) else "parity/mean"
        if name not in figures:
            return None
        return self.compare(
            figures[name],
            f"log-probs of sampler and trainer differ by {figures[name]:.2g} per token on average ({name})",
        )


@dataclass(frozen=True)
class VerificationFailing(Limit):
    """Answers that nobody could judge: the verification ran out of time or memory, died, or could not read the gold.

    Args:
        above: Share of the answers of a rollout.
        window: Rollouts over which it is averaged.
    """

    name: ClassVar[str] = "verification_failing"
    advice: ClassVar[str] = (
        "`observe-r1 audit LADDER` finds the golds that cannot be judged. For time-outs raise timeout_seconds and "
        "workers of observe_r1.rewards.AccuracyReward, for memory memory_bytes."
    )
    above: float = 0.05
    well_below: float = 0.02
    window: int = 5

    def read(self, figures: Figures, memory: Memory) -> Reading | None:
        counts = {name: figures[f"verdicts/{name}"] for name in FAILURES if f"verdicts/{name}" in figures}
        total = figures.get("verdicts/all", 0.0)
        if not total:
            return None
        trend = follow(memory, "failed", sum(counts.values()) / total, self.window)
        worst = max(counts, key=lambda name: counts[name], default="")
        if trend is None:
            return None
        return self.compare(
            trend.recent, f"{trend.recent:.1%} of the answers of the last rollouts could not be judged, mostly {worst}"
        )


@dataclass(frozen=True)
class SkippedSamples(Limit):
    """Samples of the ladder that could not be used.

    Args:
        above: Share of the samples that were drawn.
        window: Rollouts over which it is averaged.
    """

    name: ClassVar[str] = "skipped_samples"
    advice: ClassVar[str] = (
        "summary.json counts the reasons, and the log names the first sample of each. `observe-r1 ladder inspect` and "
        "`import` with skipped.jsonl show what to repair."
    )
    stops: bool = False  # the others are trained on
    above: float = 0.05
    well_below: float = 0.02
    window: int = 5

    def read(self, figures: Figures, memory: Memory) -> Reading | None:
        if "samples/drawn" not in figures or not figures["samples/drawn"]:
            return None
        trend = follow(memory, "skipped", figures["samples/skipped"] / figures["samples/drawn"], self.window)
        if trend is None:
            return None
        return self.compare(trend.recent, f"{trend.recent:.1%} of the samples of the last rollouts could not be used")
