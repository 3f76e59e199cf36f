"""`--ckpt_path last`: the newest checkpoint of an experiment, over all of its runs."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from observe_r1.atomic_files import PREVIOUS


def find_last(trainer: L.Trainer) -> str | None:
    """The newest `last.ckpt` in the run directories of the experiment; None where no run has saved anything yet.

    Lightning looks into the directory of the new run alone, which is empty.

    Raises:
        ValueError: Nothing saves a `last.ckpt`.
    """
    callbacks = [callback for callback in trainer.callbacks if isinstance(callback, ModelCheckpoint)]  # type: ignore[attr-defined]
    if not callbacks:
        raise ValueError(
            "ckpt_path is last, but no callback saves checkpoints: add lightning.pytorch.callbacks.ModelCheckpoint "
            "with save_last: true, or name a file."
        )
    behind_url = next((str(c.dirpath) for c in callbacks if "://" in str(c.dirpath)), None)
    if behind_url is not None:
        raise ValueError(f"ckpt_path is last, and checkpoints are saved behind the URL {behind_url}: name the file.")
    last: dict[Path, float] = {}  # with the time when it was written
    others: dict[Path, float] = {}
    for callback in callbacks:
        for directory in filter(Path.is_dir, _directories(trainer, callback)):
            for entry in directory.iterdir():
                # a crash may have come between the two renames that replace a directory
                path = entry.with_name(entry.name.removesuffix(PREVIOUS))
                if path.suffix == callback.FILE_EXTENSION and entry.exists():
                    kind = last if path.stem.startswith(callback.CHECKPOINT_NAME_LAST) else others
                    kind[path] = max(entry.stat().st_mtime, kind.get(path, 0.0))
    if last:
        return str(max(last, key=lambda path: last[path]))
    if others:
        raise ValueError(
            f"ckpt_path is last, and none of the {len(others)} checkpoints of this experiment is a last.ckpt. Name one "
            f"of them, the newest is {str(max(others, key=lambda path: others[path]))!r}, and set save_last: true of "
            "ModelCheckpoint."
        )
    where = callbacks[0].dirpath or _experiment(trainer)
    rank_zero_info(f"ckpt_path is last, and nothing is saved in {str(where)!r} yet: the training begins anew.")
    return None


def _directories(trainer: L.Trainer, callback: ModelCheckpoint) -> list[Path]:
    """Where runs of this experiment keep what the callback saves."""
    if callback.dirpath is not None:
        return [Path(callback.dirpath)]
    experiment = _experiment(trainer)
    return [*experiment.glob("*/checkpoints")] if trainer.loggers else [experiment / "checkpoints"]


def _experiment(trainer: L.Trainer) -> Path:
    if not trainer.loggers:
        return Path(trainer.default_root_dir)
    logger = trainer.loggers[0]
    return Path(logger.save_dir or trainer.default_root_dir) / str(logger.name)
