"""Logs what the rewards did: histograms, and completions beside their pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch

from observe_r1.callbacks.media.completions_picture import draw_completions
from observe_r1.callbacks.media.logger_media import log_histograms, log_picture
from observe_r1.callbacks.run_directory import run_directory
from observe_r1.callbacks.saved_completions import DIRECTORY, save_completions
from observe_r1.experience import Experience, PromptGroup
from observe_r1.module import ObserveR1


class RewardLogger(L.Callback):
    """After every rollout: histograms of rewards, advantages, weights and lengths; every so often a completions table.

    The table is a picture (in loggers that show pictures, and `completions/*.png` in the run directory) of some
    questions with their image, the best and the worst completion; `completions/completions.jsonl` holds all completions
    of those rollouts and `completions/images` the images of the table.
    What the answer verification counted (time-outs, golds that do not parse) is logged under `verification/`.

    Args:
        table_every_n_rollouts: A table is drawn for the first rollout and every n-th after it; 0 for none.
        rows: Questions in a table.
    """

    def __init__(self, table_every_n_rollouts: int = 10, rows: int = 4) -> None:
        if table_every_n_rollouts < 0 or rows < 1:
            raise ValueError(
                f"RewardLogger: table_every_n_rollouts is {table_every_n_rollouts} (valid: 0 and up) and rows {rows} "
                "(valid: 1 and up)."
            )
        self.table_every_n_rollouts = table_every_n_rollouts
        self.rows = rows
        self.rollouts = 0
        self.run_directory: Path | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.run_directory = run_directory(trainer)

    def on_rollout_end(self, trainer: L.Trainer, pl_module: ObserveR1, experience: Experience) -> None:
        metrics = {f"verification/{name}": float(count) for name, count in experience.verdicts.items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        if trainer.is_global_zero:
            self._log_histograms(trainer, experience)
            if self.table_every_n_rollouts and self.rollouts % self.table_every_n_rollouts == 0:
                self._log_table(trainer, experience.groups)
        self.rollouts += 1

    def state_dict(self) -> dict[str, Any]:
        return {"rollouts": self.rollouts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rollouts = state_dict["rollouts"]

    def _log_histograms(self, trainer: L.Trainer, experience: Experience) -> None:
        scores = [group.scores for group in experience.groups if group.scores is not None]
        histograms = {
            "histogram/reward": torch.cat([score.reward for score in scores]),
            "histogram/advantage": torch.cat([score.advantage for score in scores]),
            "histogram/dynamic_weight": torch.tensor([score.weight for score in scores]),
            "histogram/pass_rate": torch.tensor([score.pass_rate for score in scores]),
            "histogram/length": torch.tensor([len(c) for group in experience.groups for c in group.completions]),
        }
        log_histograms(trainer.loggers, histograms, trainer.global_step)

    def _log_table(self, trainer: L.Trainer, groups: list[PromptGroup]) -> None:
        picture = draw_completions(groups[: self.rows], f"step {trainer.global_step}")
        log_picture(trainer.loggers, "completions", picture, trainer.global_step)
        if self.run_directory is None:
            return
        from PIL import Image

        save_completions(self.run_directory, "completions.jsonl", groups, trainer.global_step, with_pictures=self.rows)
        Image.fromarray(picture).save(self.run_directory / DIRECTORY / f"step-{trainer.global_step:06d}.png")
