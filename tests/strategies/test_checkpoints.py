"""Checkpoints of every strategy: resumed, exported, and whole when a save dies half-way."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from .conftest import BASE, STRATEGIES, Run, needs_deepspeed, run_steps

SAVING = (
    "--trainer.devices=2",
    "--trainer.max_steps=4",
    "--trainer.accumulate_grad_batches=2",
    "--trainer.enable_checkpointing=true",
    "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
    "--trainer.callbacks.dirpath=checkpoints",
    "--trainer.callbacks.every_n_train_steps=1",
    "--trainer.callbacks.save_last=true",
    "--trainer.callbacks.save_top_k=0",
    "--model.rollout=observe_r1.rollout.HFRollout",
    "--model.sampling.max_new_tokens=16",
    "--model.scheduler=null",  # it would end with the first part
)
LORA = "--model.policy.lora={rank: 4}"
ALL = [
    "ddp",
    "fsdp2",
    pytest.param("zero2", marks=needs_deepspeed),
    pytest.param("zero3", marks=needs_deepspeed),
]


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(weight, other[name]) for name, weight in one.items())


def exported(command_line: Any, run: Run) -> dict[str, torch.Tensor]:
    command_line(run.directory)("export", "checkpoints/last.ckpt", "exported")
    for file in ("config.json", "generation_config.json", "tokenizer.json", "processor_config.json"):
        assert (run.directory / "exported" / file).exists(), file
    return load_file(run.directory / "exported/model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [(), (LORA,)], ids=["full", "lora"])
@pytest.mark.parametrize("strategy", ALL)
def test_resumed_runs_and_exports_equal_uninterrupted_ones(
    strategy: str, adapters: tuple[str, ...], tmp_path: Path, tiny_ladder: Path, command_line: Any
) -> None:
    """Stopped in the middle of a rollout, and resumed by new processes."""
    if adapters:
        pytest.importorskip("peft")
    arguments = (*SAVING, *adapters, f"--data.ladder={tiny_ladder}", *STRATEGIES[strategy])
    whole = run_steps(command_line, tmp_path / "whole", *arguments)
    parts = tmp_path / "parts"
    run_steps(command_line, parts, *arguments, "--trainer.max_steps=3")
    resumed = run_steps(command_line, parts, *arguments, "--ckpt_path=checkpoints/last.ckpt")
    assert same_weights(resumed.weights, whole.weights)
    # DeepSpeed's files round nothing, and adapters are merged by the same arithmetic
    assert same_weights(exported(command_line, whole), whole.weights)


@pytest.mark.slow
def test_a_save_that_dies_leaves_the_checkpoint_before_it(tmp_path: Path, tiny_ladder: Path, command_line: Any) -> None:
    arguments = (*SAVING, f"--data.ladder={tiny_ladder}", *STRATEGIES["fsdp2"])
    dying = ("--trainer.callbacks+=scripted.FullDisk", "--trainer.callbacks.step=3")
    shutil.copy(Path(__file__).with_name("scripted.py"), tmp_path)
    output = command_line(tmp_path)(*BASE, *arguments, *dying, expect=1)
    assert "No space left on device" in output
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"last.ckpt", "last.ckpt.partial"}
    assert torch.load(tmp_path / "checkpoints/last.ckpt/meta.pt", weights_only=True)["global_step"] == 2
    run = run_steps(command_line, tmp_path, *arguments, "--ckpt_path=checkpoints/last.ckpt")
    assert len(run.steps) == 2
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"last.ckpt"}
