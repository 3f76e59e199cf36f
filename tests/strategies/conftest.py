"""Runs on two ranks through the command line, with the figures that they log."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

needs_deepspeed = [
    pytest.mark.deepspeed,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]

BASE = (
    "fit",
    "--config=quickstart.yaml",
    "--trainer.accelerator=cpu",
    "--trainer.accumulate_grad_batches=3",
    "--trainer.max_steps=3",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.limit_val_batches=0",
    "--trainer.val_check_interval=null",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
    "--trainer.logger.save_dir=logs",
    "--trainer.callbacks=scripted.FinalWeights",
    "--model.rewards=null",
    "--model.rewards={even: scripted.EvenLength, short: scripted.Shortness}",
    "--model.rollout=scripted.ScriptedRollout",
    "--model.sampling.group_size=4",
    "--model.updates.steps_per_rollout=2",
    "--model.policy.gradient_checkpointing=true",
    "--model.kl={coefficient: 0.05, placement: loss, estimator: k3}",
    "--data.class_path=observe_r1.datamodules.NeuraLadderDataModule",
    "--data.prompts_per_rollout=8",
    "--data.workers=0",
)
ZERO = "--trainer.strategy=scripted.CPUDeepSpeed"
STRATEGIES = {
    "ddp": ("--trainer.strategy=DDPStrategy", "--trainer.strategy.gradient_as_bucket_view=true"),
    "fsdp2": ("--trainer.strategy=fsdp2",),
    "zero2": (ZERO, "--trainer.strategy.stage=2"),
    "zero3": (ZERO, "--trainer.strategy.stage=3"),
}
FIGURES = (
    "train/loss",
    "train/kl",
    "train/entropy",
    "train/log_ratio",
    "train/gradient_norm",
    "rollout/length",
    "rollout/reward",
)
ANSWERS = ("val/pass_rate", "val/length")


@dataclass
class Run:
    """What a run left behind."""

    directory: Path
    steps: list[dict[str, float]]  # `FIGURES` of every optimizer step
    validations: list[dict[str, float]]  # `ANSWERS` of every validation
    weights: dict[str, torch.Tensor]  # at the end


def run_steps(command_line: Callable[[Path], Any], directory: Path, *arguments: str) -> Run:
    """A short run; `arguments` override `BASE`."""
    directory.mkdir(exist_ok=True)
    shutil.copy(Path(__file__).with_name("scripted.py"), directory)
    command_line(directory)(*BASE, *arguments)
    metrics = max(directory.rglob("metrics.csv"))  # of the last version
    with metrics.open() as file:
        rows = list(csv.DictReader(file))
    steps, figures = [], {}  # those of a rollout are in a row before those of its steps
    for row in rows:
        figures |= {name: float(row[name]) for name in FIGURES if row.get(name)}
        if row["train/loss"]:
            steps.append(dict(figures))
    answered = [{name: float(row[name]) for name in ANSWERS} for row in rows if row.get("val/length")]
    return Run(directory, steps, answered, torch.load(directory / "weights.pt"))
