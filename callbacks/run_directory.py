"""Where a run keeps its files, whatever logs it."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger


def run_directory(trainer: L.Trainer) -> Path | None:
    """Directory of config, checkpoints, completions and summary; None in a `fast_dev_run`, which leaves nothing.

    It belongs to the first logger: the directory of its own for TensorBoard and CSV, `SAVE_DIR/NAME/VERSION` for any
    other, with `default_root_dir` where it has no `save_dir` (MLflow on a server or a database), and `default_root_dir`
    itself without loggers. These are the places where Lightning's `ModelCheckpoint` makes `checkpoints`; Lightning's
    `trainer.log_dir` is another one, shared by all runs, for W&B, and none at all for MLflow.

    Asks the first rank, so every rank has to call it.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    first = trainer.loggers[0] if trainer.loggers else None
    if first is None or isinstance(first, TensorBoardLogger | CSVLogger):
        directory = trainer.log_dir
        return None if directory is None else Path(directory)
    path: Path | None = None
    if trainer.is_global_zero:  # ids of runs are made there
        version = first.version if isinstance(first.version, str) else f"version_{first.version}"
        path = Path(first.save_dir or trainer.default_root_dir) / str(first.name) / version
    return trainer.strategy.broadcast(path)
