"""Checkpoints of every strategy: resumed, exported, and whole when a save is interrupted."""

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


INTERRUPTED = (
    *SAVING,
    "--trainer.callbacks.dirpath=null",  # in the directory of the run
    "--model.rollout=scripted.ScriptedRollout",
)
ASYNC = "--config=checkpoints/async.yaml"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, tiny_ladder: Path, command_line: Any) -> Run:
    directory = tmp_path_factory.mktemp("uninterrupted") / "run"
    return run_steps(command_line, directory, *INTERRUPTED, f"--data.ladder={tiny_ladder}", *STRATEGIES["ddp"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "overlay", "rank", "by"),
    [
        ("ddp", (), 0, "full_disk"),
        ("ddp", (ASYNC,), 0, "kill_at_sync"),
        ("fsdp2", (), 1, "full_disk"),
        ("fsdp2", (ASYNC,), 1, "full_disk"),
        pytest.param("zero2", (), 0, "full_disk", marks=needs_deepspeed),
        pytest.param("zero3", (), 1, "kill", marks=needs_deepspeed),
    ],
)
def test_after_an_interrupted_save_the_run_goes_on_from_the_one_before(
    strategy: str,
    overlay: tuple[str, ...],
    rank: int,
    by: str,
    uninterrupted: Run,
    tmp_path: Path,
    tiny_ladder: Path,
    command_line: Any,
) -> None:
    """Every run has a directory of its own; `last` finds what the one before saved."""
    arguments = (*overlay, *INTERRUPTED, f"--data.ladder={tiny_ladder}", *STRATEGIES[strategy], "--ckpt_path=last")
    callback = ("--trainer.callbacks+=scripted.InterruptedSave", "--trainer.callbacks.step=3")
    callback += (f"--trainer.callbacks.rank={rank}", f"--trainer.callbacks.by={by}")
    shutil.copy(Path(__file__).with_name("scripted.py"), tmp_path)
    output = command_line(tmp_path)(*BASE, *arguments, *callback, expect=-9 if by != "full_disk" and rank == 0 else 1)
    assert "the training begins anew" in output
    runs = tmp_path / "logs/quickstart"
    if by == "full_disk":
        assert "'logs/quickstart/version_0/checkpoints/last.ckpt' could not be written: " in output
        assert ("File too large" if strategy == "ddp" else "the disk took less than was written") in output
    run = run_steps(command_line, tmp_path, *arguments)
    assert len(run.steps) == 2  # of four
    for name, weight in run.weights.items():
        assert (weight - uninterrupted.weights[name]).abs().max() <= 2e-5, name
    assert {path.name for path in (runs / "version_1").rglob("*.ckpt*")} == {"last.ckpt"}
