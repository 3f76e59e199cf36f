"""The same global batch gives the same steps under every strategy: two processes on a CPU against one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
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
    "--trainer.logger=false",
    "--trainer.callbacks=scripted.Recorder",
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
    "ddp": ("--trainer.strategy=ddp",),
    "fsdp2": ("--trainer.strategy=fsdp2",),
    "zero2": (ZERO, "--trainer.strategy.stage=2"),
    "zero3": (ZERO, "--trainer.strategy.stage=3"),
}


def run_steps(
    command_line: Callable[[Path], Any], directory: Path, ladder: Path, *arguments: str
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Figures of the optimizer steps, and the final weights."""
    directory.mkdir()
    shutil.copy(Path(__file__).with_name("scripted.py"), directory)
    command_line(directory)(*BASE, f"--data.ladder={ladder}", *arguments)
    return json.loads((directory / "steps.json").read_text()), torch.load(directory / "weights.pt")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_ladder: Path, command_line: Any) -> Any:
    return run_steps(command_line, tmp_path_factory.mktemp("alone") / "run", tiny_ladder, "--trainer.devices=1")


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    ["ddp", "fsdp2", pytest.param("zero2", marks=needs_deepspeed), pytest.param("zero3", marks=needs_deepspeed)],
)
def test_two_ranks_take_the_steps_of_one(
    strategy: str, alone: Any, tmp_path: Path, tiny_ladder: Path, command_line: Any
) -> None:
    steps, weights = run_steps(
        command_line, tmp_path / "run", tiny_ladder, "--trainer.devices=2", *STRATEGIES[strategy]
    )
    expected_steps, expected_weights = alone
    assert len(steps) == 3
    for step, expected in zip(steps, expected_steps, strict=True):
        assert step == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert expected_steps[0]["train/gradient_norm"] > 0.01
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        assert (weight - expected_weights[name]).abs().max() <= 2e-5, name
