"""Pictures, histograms, text and the config, in the way of each logger. Lightning has no common call for them.

TensorBoard and W&B show all of them, MLflow has no histograms and no text. Other loggers get the figures that
Lightning gives them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakSet

import numpy as np
import numpy.typing as npt
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

_told: WeakSet[Logger] = WeakSet()


def log_picture(loggers: Iterable[Logger], name: str, picture: npt.NDArray[np.uint8], step: int) -> None:
    """Shows a picture [height, width, 3] under a name; on the first rank only."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, picture, step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [picture], step=step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_image(logger.run_id, picture, key=name, step=step, synchronous=True)
        elif logger not in _told and not isinstance(logger, DummyLogger):  # of a `fast_dev_run`
            _told.add(logger)
            rank_zero_info(f"{type(logger).__name__} shows no pictures; they are in the run directory.")


def log_histograms(loggers: Iterable[Logger], values: Mapping[str, Tensor], step: int) -> None:
    """Shows how values are distributed, by name; on the first rank only."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            for name, numbers in values.items():
                logger.experiment.add_histogram(name, numbers.float(), global_step=step)
        elif isinstance(logger, WandbLogger):
            import wandb

            histograms: dict[str, Any] = {name: wandb.Histogram(numbers.tolist()) for name, numbers in values.items()}
            logger.log_metrics(histograms, step=step)


def log_text(loggers: Iterable[Logger], name: str, text: str, step: int) -> None:
    """Shows a text in Markdown under a name; on the first rank only."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(name, text, step)
        elif isinstance(logger, WandbLogger):
            logger.log_text(name, columns=["text"], data=[[text]], step=step)


def log_config(loggers: Iterable[Logger], config: Mapping[str, Any]) -> None:
    """Keeps the config of a run beside its figures; on the first rank only. TensorBoard and CSV have it as a file."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.config.update(dict(config), allow_val_change=True)  # a resumed run may have changed some
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_dict(logger.run_id, dict(config), "config.yaml")
