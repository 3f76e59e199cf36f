"""What came of a run, in the terminal when it ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L

from observe_r1.callbacks.cluster.preemption import Preempted
from observe_r1.callbacks.health import Health, SickRun
from observe_r1.callbacks.hf_export import HFExport
from observe_r1.callbacks.lookup import first_of
from observe_r1.callbacks.run_directory import run_directory
from observe_r1.callbacks.run_summary import RunSummary
from observe_r1.callbacks.terminal import say, show, tensorboard
from observe_r1.experience import Experience
from observe_r1.module import ObserveR1
from observe_r1.readable import duration

PHASES = {  # names of the phase clock, in words
    "generate": "sampling",
    "train": "training",
    "validate": "held-out questions",
    "reference_logprobs": "reference",
    "old_logprobs": "old log-probs",
    "reward": "rewards",
    "data": "data",
    "exchange": "groups between ranks",
    "weight_sync": "weights to the sampler",
    "evaluate": "benchmarks",
}


class ClosingSummary(L.Callback):
    """Pass rate before and after, where the time went, what was wasted or skipped, warnings, and what to do next.

    Of a run that fails it says how to go on.
    """

    def __init__(self) -> None:
        self.rollouts = 0
        self.wasted = 0.0  # sum of their shares
        self.run_directory: Path | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.run_directory = run_directory(trainer)

    def on_rollout_end(self, trainer: L.Trainer, module: ObserveR1, experience: Experience) -> None:
        self.rollouts += 1
        self.wasted += experience.metrics["rollout/wasted_groups"]

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data: Any = getattr(trainer, "datamodule", None)
        skipped = data.skipped() if hasattr(data, "skipped") else {}  # asks the other ranks
        if trainer.is_global_zero:
            assert isinstance(pl_module, ObserveR1)
            show("finished", self.rows(trainer, pl_module, skipped))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        said = isinstance(exception, SickRun | Preempted)  # where their checkpoints are
        if said or not trainer.is_global_zero or trainer.state.fn != "fit":
            return
        last = self._last_checkpoint(trainer)
        if last is not None:
            say(f"Stopped at step {trainer.global_step}. To go on: the same command with --ckpt_path {last}")
        elif trainer.global_step > 0 and not any(saved(trainer, "best_model_path")):
            say(f"Stopped at step {trainer.global_step}, before this run saved a checkpoint.")

    def state_dict(self) -> dict[str, float]:
        return {"rollouts": self.rollouts, "wasted": self.wasted}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.rollouts, self.wasted = int(state_dict["rollouts"]), state_dict["wasted"]

    def rows(self, trainer: L.Trainer, module: ObserveR1, skipped: dict[str, dict[str, int]]) -> dict[str, str]:
        """What the summary says, by name."""
        rows = {
            "pass rate": self._pass_rate(trainer),
            "time": times(module, first_of(trainer, RunSummary)),
            "groups": "",
            "skipped": "",
        }
        if self.rollouts:
            rows["groups"] = f"{self.wasted / self.rollouts:.0%} all right or all wrong, without any gradient"
        reasons = [f"{n} × {reason} ({split})" for split, counts in skipped.items() for reason, n in counts.items()]
        rows["skipped"] = ", ".join(reasons) or "none"
        rows["health"] = health(trainer)
        rows |= self._places(trainer)
        return {name: value for name, value in rows.items() if value}

    def _pass_rate(self, trainer: L.Trainer) -> str:
        """Of the held-out questions."""
        kept = first_of(trainer, RunSummary)
        known = [] if kept is None else [(v["step"], v["pass_rate"]) for v in kept.validations if "pass_rate" in v]
        if not known:
            return ""
        (first, before), (last, after) = known[0], known[-1]
        if last == first:
            return f"{before:.1%} at step {first}"
        best_step, best = max(known, key=lambda found: found[1])
        return f"{before:.1%} (step {first}) → {after:.1%} (step {last}), best {best:.1%} at step {best_step}"

    def _places(self, trainer: L.Trainer) -> dict[str, str]:
        """What was written, and the next command."""
        if self.run_directory is None:
            return {}
        places, last = {"summary": str(self.run_directory / "summary.json")}, self._last_checkpoint(trainer)
        if first_of(trainer, RunSummary) is None:
            places = {"written to": str(self.run_directory)}
        export = first_of(trainer, HFExport)
        if export is not None:
            places["model"] = export.directory or str(self.run_directory / "hf")
        places["look at it"] = f"observe-r1 report {self.run_directory}"
        if tensorboard(trainer, self.run_directory):
            places["look at it"] += f", {tensorboard(trainer, self.run_directory)}"
        if last is not None:
            config = self.run_directory / "config.yaml"
            places["next"] = f"observe-r1 validate --config {config} --ckpt_path {last}"
        return places

    @staticmethod
    def _last_checkpoint(trainer: L.Trainer) -> str | None:
        return next(saved(trainer, "last_model_path"), None)


def saved(trainer: L.Trainer, kind: str) -> Iterator[str]:
    """What the callbacks that save checkpoints have saved as the last or the best one."""
    return (str(path) for callback in trainer.checkpoint_callbacks if (path := getattr(callback, kind, "")))


def times(module: ObserveR1, summary: RunSummary | None) -> str:
    """Of the run, and per phase, the longest first; phases of less than a hundredth are left out."""
    seconds = module.clock.total
    all_of_them = sum(seconds.values()) if summary is None else summary.seconds()
    rest = all_of_them - sum(seconds.values())
    longest = [*sorted(((amount, phase) for phase, amount in seconds.items()), reverse=True), (rest, "other")]
    named = [f"{PHASES.get(phase, phase)} {duration(t)}" for t, phase in longest if t > 0.01 * all_of_them]
    return f"{duration(all_of_them)}: {', '.join(named)}" if named else ""


def health(trainer: L.Trainer) -> str:
    """The warnings there were."""
    found = first_of(trainer, Health)
    if found is None:
        return ""
    begun = [f"{event.headline}" for event in found.watch.events if event.begins]
    return f"{', '.join(begun)}: see docs/curves.md" if begun else "no warnings"
