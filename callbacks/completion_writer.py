"""Writes what `observe-r1 predict` answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter

from observe_r1.experience import PromptGroup, Sealed
from observe_r1.ranks import over_ranks


class CompletionWriter(BasePredictionWriter):
    """One JSON line per answer: id, gold, completion, whether it is correct. Each rank writes a file of its own.

    Args:
        path: Of the file, a new one; ranks above 0 put `.rankN` before the suffix.
    """

    def __init__(self, path: str = "completions.jsonl") -> None:
        super().__init__(write_interval="batch")
        self.path = Path(path)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "predict":
            return
        of_ranks = self.path.parent.glob(f"{self.path.stem}.rank*{self.path.suffix}")
        here = [str(path) for path in (self.path, *sorted(of_ranks)) if path.exists()]
        found = list(dict.fromkeys(chain.from_iterable(over_ranks(here))))  # before any of them has made its own
        if found:
            raise ValueError(
                f"CompletionWriter.path: {' and '.join(found)} exists already; name another file or delete it first."
            )

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_rank:
            self.path = self.path.with_suffix(f".rank{trainer.global_rank}{self.path.suffix}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Sealed[list[PromptGroup]],
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            for group in prediction.content:
                prompt = group.prompt.prompt
                for number, completion in enumerate(group.completions):
                    row = {
                        "id": prompt.id,
                        "position": prompt.position,
                        "gold": prompt.gold.answer,
                        "completion": completion.text,
                        "truncated": completion.truncated,
                        "correct": None if group.scores is None else bool(group.scores.correct[number]),
                    }
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
