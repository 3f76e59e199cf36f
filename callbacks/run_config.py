"""Keeps the config of a run where its other files are."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import yaml
from lightning.pytorch.cli import SaveConfigCallback

from observe_r1.callbacks.media.logger_media import log_config
from observe_r1.callbacks.run_directory import run_directory
from observe_r1.masking import masked


class RunConfig(SaveConfigCallback):
    """Writes `config.yaml` into the run directory and gives the config to W&B and MLflow. Part of the command line.

    To be used with `save_to_log_dir=False`: Lightning's log directory is not the run directory for every logger.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.directory = run_directory(trainer)
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.directory is None:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        path = str(self.directory / self.config_filename)
        if stage != "fit" and Path(path).exists():  # of the training whose directory this is
            return
        self.parser.save(self.config, path, skip_none=False, overwrite=self.overwrite, multifile=self.multifile)
        log_config(trainer.loggers, masked(yaml.safe_load(self.parser.dump(self.config, skip_none=False))))
