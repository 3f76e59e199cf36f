"""Writes the trained policy as a Hugging Face directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import lightning as L

from observe_r1 import __version__
from observe_r1.callbacks.run_directory import run_directory
from observe_r1.module import ObserveR1

MARKER = "observe_r1.json"  # of a directory that was written here


class HFExport(L.Callback):
    """Saves model, processor and generation config at the end of the fit, to be loaded by `from_pretrained`.

    Args:
        directory: Where to, a new or empty one, or one of an earlier export, which is replaced; null for `hf` in the
            run directory.
        every_n_steps: Also after every n-th optimizer step, into the same place; 0 only at the end.
    """

    def __init__(self, directory: str | None = None, every_n_steps: int = 0) -> None:
        if every_n_steps < 0:
            raise ValueError(
                f"HFExport.every_n_steps is {every_n_steps}: use 0 (only at the end) or a positive number."
            )
        self.directory = directory
        self.every_n_steps = every_n_steps
        self.run_directory: Path | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.run_directory = run_directory(trainer)
        if stage != "fit" or self.directory is None:
            return
        found = [path.name for path in Path(self.directory).glob("*")]
        if found and MARKER not in found:
            raise ValueError(
                f"HFExport.directory is {self.directory!r}, which holds what no HFExport has written and would be "
                "replaced: name a new directory, or null for `hf` in the run directory."
            )

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        steps = trainer.global_step
        is_new_step = (trainer.fit_loop.total_batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if self.every_n_steps and is_new_step and steps % self.every_n_steps == 0:
            self.export(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.export(trainer, pl_module)

    def export(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Writes the files; they appear together, under their final name only when all are there."""
        assert isinstance(module, ObserveR1)
        writes = trainer.is_global_zero  # the others help where weights are sharded
        target = Path(self.directory or (self.run_directory or Path()) / "hf")
        partial = target.with_name(target.name + ".partial")
        if writes and partial.exists():  # of an export that was interrupted
            shutil.rmtree(partial)
        module.policy.save_pretrained(partial, writes)
        if not writes:
            return
        module.encoder.processor.save_pretrained(partial)
        (partial / MARKER).write_text(json.dumps({"optimizer_steps": trainer.global_step, "version": __version__}))
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
