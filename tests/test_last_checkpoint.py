"""What `--ckpt_path last` finds, over the directories of all runs of an experiment."""

from __future__ import annotations

import os
from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from observe_r1.last_checkpoint import find_last


def trainer_of(directory: Path, *callbacks: ModelCheckpoint) -> L.Trainer:
    """Of a new run of the experiment."""
    options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    if not callbacks:
        options["enable_checkpointing"] = False
    return L.Trainer(logger=CSVLogger(directory, "experiment"), callbacks=list(callbacks), **options)  # type: ignore[arg-type]


def saved(directory: Path, path: str, seconds: int) -> str:
    file = directory / "experiment" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    os.utime(file, (seconds, seconds))
    return str(file)


def test_the_newest_of_all_runs(tmp_path: Path) -> None:
    saved(tmp_path, "version_0/checkpoints/last.ckpt", 1)
    newest = saved(tmp_path, "version_1/checkpoints/last-v1.ckpt", 4)
    saved(tmp_path, "version_1/checkpoints/last.ckpt", 3)
    saved(tmp_path, "version_2/checkpoints/epoch=0-step=9.ckpt", 8)
    saved(tmp_path, "version_2/checkpoints/last.ckpt.partial", 9)
    assert find_last(trainer_of(tmp_path, ModelCheckpoint(save_last=True))) == newest


def test_one_that_a_crash_left_under_its_other_name(tmp_path: Path) -> None:
    """Whoever loads it looks for that name: `intact`."""
    saved(tmp_path, "version_0/checkpoints/last.ckpt", 1)
    moved = saved(tmp_path, "version_1/checkpoints/last.ckpt.previous", 2)
    assert find_last(trainer_of(tmp_path, ModelCheckpoint(save_last=True))) == moved.removesuffix(".previous")


def test_a_directory_that_was_asked_for(tmp_path: Path) -> None:
    saved(tmp_path, "version_0/checkpoints/last.ckpt", 9)
    asked = saved(tmp_path, "elsewhere/last.ckpt", 1)
    callback = ModelCheckpoint(dirpath=tmp_path / "experiment/elsewhere", save_last=True)
    assert find_last(trainer_of(tmp_path, callback)) == asked


def test_without_any_checkpoint_the_training_begins(tmp_path: Path) -> None:
    assert find_last(trainer_of(tmp_path, ModelCheckpoint(save_last=True))) is None


def test_without_a_last_one_the_error_names_the_newest(tmp_path: Path) -> None:
    saved(tmp_path, "version_0/checkpoints/epoch=0-step=9.ckpt", 1)
    newest = saved(tmp_path, "version_1/checkpoints/epoch=0-step=8.ckpt", 2)
    with pytest.raises(ValueError, match=rf"none of the 2 checkpoints .* the newest is '{newest}', and set save_last"):
        find_last(trainer_of(tmp_path, ModelCheckpoint()))
    with pytest.raises(ValueError, match="no callback saves checkpoints"):
        find_last(trainer_of(tmp_path))
