"""Ends a training that its cluster takes the machines from, with a checkpoint to go on from."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from observe_r1.callbacks.run_directory import run_directory
from observe_r1.experience import MicroBatch, Sealed
from observe_r1.process_lifetime import is_started_by_rank
from observe_r1.ranks import any_rank

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(SystemExit):
    """The exit of a training that ends because it was asked to."""


class Preemption(L.Callback):
    """After SIGTERM or SIGUSR1 the training goes on to the end of an optimizer step, saves `last.ckpt`, exits with 75.

    A signal to any rank ends all of them. The checkpoint lies beside the others; `--ckpt_path` continues it exactly.
    Part of every run of the command line. It takes the place of Lightning's handlers, which save wherever the signal
    finds a rank: in the middle of a collective, or of a rollout whose prompts would be lost.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.handlers: dict[signal.Signals, Any] = {}
        self.run_directory: Path | None = None
        self.speaks = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.run_directory = run_directory(trainer)
        self.speaks = trainer.is_global_zero

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.signal(number, self.note) for number in SIGNALS}

    def note(self, number: int, frame: Any) -> None:
        """The handler: what the signal asks for has to wait until all ranks can do it."""
        self.received = signal.Signals(number)
        if self.speaks:  # not through Python's streams, which the handler may have interrupted
            os.write(2, f"\n{self.received.name}: the training ends after the next optimizer step\n".encode())

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Sealed[MicroBatch], batch_idx: int
    ) -> None:
        # between micro-batches of a step, its gradients would be lost
        if not batch.content.last_of_step or not any_rank(self.received is not None, pl_module.device):
            return
        if trainer.global_step >= trainer.estimated_stepping_batches:
            return  # the training ends by itself
        path = self.checkpoint_path(trainer)
        trainer.save_checkpoint(path)
        name = "a signal to another rank" if self.received is None else self.received.name
        rank_zero_info(f"Ended by {name} after step {trainer.global_step}. Continue with --ckpt_path {path}")
        # Lightning kills all ranks of a node when one that it started fails, also the one whose exit code counts
        raise Preempted(0 if is_started_by_rank() else EXIT_CODE)

    def checkpoint_path(self, trainer: L.Trainer) -> str:
        """Where `--ckpt_path last` looks for it."""
        saving = trainer.checkpoint_callback
        if isinstance(saving, ModelCheckpoint) and saving.dirpath is not None:
            return f"{saving.dirpath}/{saving.CHECKPOINT_NAME_LAST}{saving.FILE_EXTENSION}"  # maybe a URL
        return str(Path(self.run_directory or trainer.default_root_dir) / "checkpoints" / "last.ckpt")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.restore_handlers()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.restore_handlers()

    def restore_handlers(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}
