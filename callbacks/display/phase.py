"""What a training is doing at the moment, for those who watch."""

from __future__ import annotations

from typing import Any, Literal

import lightning as L

from observe_r1.experience import Experience

Phase = Literal["starting", "sampling", "training", "answering"]


class PhaseHooks(L.Callback):
    """Follows the phases of a training; a base of callbacks that show them."""

    phase: Phase = "starting"
    _left = 0  # micro-batches of the rollout that is trained on

    def phase_changed(self) -> None:
        """Called when `phase` has a new value."""

    def on_rollout_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._enter("sampling")

    def on_rollout_end(self, trainer: L.Trainer, module: L.LightningModule, experience: Experience) -> None:
        self._left = len(experience)
        self._enter("training")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.phase != "training":  # also in the middle of a rollout that a checkpoint has brought back
            self._enter("training")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *arguments: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *arguments)
        self._left -= 1
        if self._left == 0:  # the next thing is a rollout, of which the engine may have begun the sampling before
            self._enter("sampling")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        self._enter("answering")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        self._enter("training" if self._left > 0 else "sampling")

    def _enter(self, phase: Phase) -> None:
        self.phase = phase
        self.phase_changed()
