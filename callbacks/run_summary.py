"""Writes `summary.json`: what a run was and what came of it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

from observe_r1.callbacks.health import Health
from observe_r1.callbacks.lookup import first_of
from observe_r1.callbacks.run_directory import run_directory
from observe_r1.module import ObserveR1

PACKAGES = ("observe-r1", "torch", "transformers", "lightning", "webdataset", "torchmetrics", "math-verify")


class RunSummary(L.Callback):
    """Keeps the held-out pass rate of a training and writes `summary.json` in the run directory.

    `before` is the validation that runs ahead of the first step (`num_sanity_val_steps: -1`), `after` the one at the
    last step; each is null when no such validation ran over all questions.
    """

    def __init__(self) -> None:
        self.validations: list[dict[str, Any]] = []
        self.started = time.time()
        self.seconds_before = 0.0
        self.run_directory: Path | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.started = time.time()
        self.run_directory = run_directory(trainer)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and self.run_directory is not None:  # an earlier part of the run may have left one
            (self.run_directory / "summary.json").unlink(missing_ok=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, ObserveR1)
        if trainer.sanity_checking and trainer.num_sanity_val_batches != trainer.num_val_batches:
            return
        figures = {name.removeprefix("val/"): round(float(v), 6) for name, v in pl_module.validation_figures.items()}
        self.validations.append({"step": trainer.global_step, **figures})
        if trainer.sanity_checking:  # which Lightning does not log: the curves would begin after the first steps
            for logger in trainer.loggers:
                logger.log_metrics({f"val/{name}": value for name, value in figures.items()}, trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self.validations, "seconds": self.seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validations = list(state_dict["validations"])
        self.seconds_before = state_dict["seconds"]

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.write(trainer, pl_module, "finished")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if isinstance(pl_module, ObserveR1):
            said = f": {exception}" if str(exception) else ""  # Ctrl-C says nothing
            notes = "; ".join(getattr(exception, "__notes__", ()))
            self.write(trainer, pl_module, type(exception).__name__ + said + (f" ({notes})" if notes else ""))

    def write(self, trainer: L.Trainer, module: L.LightningModule, status: str) -> None:
        """Writes the file, on the first rank; called on all of them."""
        summary = self.content(trainer, module, status)
        if trainer.is_global_zero and self.run_directory is not None:
            path = self.run_directory / "summary.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def content(self, trainer: L.Trainer, module: L.LightningModule, status: str) -> dict[str, Any]:
        """What is written."""
        assert isinstance(module, ObserveR1)
        data: Any = getattr(trainer, "datamodule", None)
        reads_ladder = hasattr(data, "skipped")
        # adds up over ranks, and after an exception the others may be gone
        skipped = data.skipped() if reads_ladder and (status == "finished" or trainer.world_size == 1) else {}
        before = next((v for v in self.validations if v["step"] == 0), None)
        after = next((v for v in reversed(self.validations) if v["step"] == trainer.global_step > 0), None)
        health = first_of(trainer, Health)
        return {
            "status": status,
            "pass_rate": {
                "before": None if before is None else before.get("pass_rate"),
                "after": None if after is None else after.get("pass_rate"),
            },
            "validations": self.validations,
            "seed": module.seed,
            "optimizer_steps": trainer.global_step,
            "seconds": {"total": round(self.seconds(), 2)}
            | {phase: round(seconds, 2) for phase, seconds in module.clock.total.items()},
            "skipped": skipped,
            "shards_with_problems": data.shard_problems() if reads_ladder else {},
            "health": [] if health is None else health.watch.warnings(),
            "verdicts": {split: dict(counts) for split, counts in module.verdicts.items()},
            "versions": versions(),
        }

    def seconds(self) -> float:
        """That the run has taken, the parts before a resume included."""
        return self.seconds_before + time.time() - self.started


def versions() -> dict[str, str]:
    """Versions of what a result depends on, and the device it ran on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})"
    return found
