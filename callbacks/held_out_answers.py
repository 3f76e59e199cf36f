"""Keeps how the answers to some held-out questions change over a training."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from observe_r1.callbacks.run_directory import run_directory
from observe_r1.callbacks.saved_completions import save_completions


class HeldOutAnswers(L.Callback):
    """At every validation, appends the answers to the same questions to `completions/held_out.jsonl`.

    `observe-r1 report` shows them side by side. The questions are spread evenly over the split, or over the share of
    the first rank.

    Args:
        questions: That are kept.
    """

    def __init__(self, questions: int = 12) -> None:
        if questions < 1:
            raise ValueError(f"HeldOutAnswers.questions is {questions}, but it must be at least 1.")
        self.questions = questions
        self.run_directory: Path | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.run_directory = run_directory(trainer)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # of `ObserveR1.validation_step`
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        all_batches = int(sum(trainer.num_val_batches))
        is_partial = trainer.sanity_checking and trainer.num_sanity_val_batches != trainer.num_val_batches
        if is_partial or self.run_directory is None or not trainer.is_global_zero or not outputs:
            return
        if trainer.state.fn != TrainerFn.FITTING:
            return
        # by number of the batch, because no rank knows how many questions there are
        wanted = Counter(number * all_batches // self.questions for number in range(self.questions))[batch_idx]
        if wanted:
            groups = [group for group in outputs["answers"] if group.scores is not None]
            shown = min(wanted, len(groups))
            chosen = [groups[number * len(groups) // shown] for number in range(shown)]
            save_completions(self.run_directory, "held_out.jsonl", chosen, trainer.global_step, shown)
