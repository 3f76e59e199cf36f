"""Ranks with different work sample in lockstep: rollouts and answers under sharded weights are those of whole ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from observe_r1.ladder.shards import write_ladder
from observe_r1.quickstart.questions import make_question

from .conftest import STRATEGIES, needs_deepspeed, run_steps

REAL = (
    "--trainer.devices=2",
    "--trainer.accumulate_grad_batches=2",
    "--trainer.max_steps=4",
    "--trainer.limit_val_batches=1.0",
    "--trainer.val_check_interval=1.0",
    "--trainer.callbacks+=observe_r1.callbacks.HFExport",
    "--model.rollout=observe_r1.rollout.HFRollout",
    "--model.rollout.init_args.sequences_per_batch=4",  # a batch for every prompt
    "--model.sampling.max_new_tokens=24",
)


@pytest.fixture(scope="module")
def mixed_ladder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every other question has no image, so rank 1 never sees one."""
    directory = tmp_path_factory.mktemp("ladders") / "mixed"
    prompts = [make_question("train", seed=5, index=index).prompt() for index in range(16)]
    text = [{"role": "user", "content": [{"type": "text", "text": "How many red circles are there?"}]}]
    prompts[1::2] = [dataclasses.replace(prompt, messages=text, images=[]) for prompt in prompts[1::2]]
    write_ladder(prompts, directory)
    return directory


@pytest.fixture(scope="module")
def odd_ladder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five questions: in batches of one, rank 1 has nothing to answer in the last."""
    directory = tmp_path_factory.mktemp("ladders") / "odd"
    write_ladder([make_question("held_out", seed=5, index=index).prompt() for index in range(5)], directory)
    return directory


@pytest.fixture(scope="module")
def ladders(mixed_ladder: Path, odd_ladder: Path) -> tuple[str, ...]:
    return (f"--data.ladder={mixed_ladder}", f"--data.held_out={odd_ladder}", "--data.questions_per_batch=1")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, ladders: tuple[str, ...], command_line: Any) -> Any:
    directory = tmp_path_factory.mktemp("whole") / "run"
    return run_steps(command_line, directory, *REAL, *ladders, *STRATEGIES["ddp"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "keep_weights_whole"),
    [("fsdp2", True), ("fsdp2", False), pytest.param("zero3", False, marks=needs_deepspeed)],
)
def test_rollouts_and_answers_are_those_of_whole_weights(
    strategy: str, keep_weights_whole: bool, whole: Any, tmp_path: Path, ladders: tuple[str, ...], command_line: Any
) -> None:
    keep = f"--model.rollout.init_args.keep_weights_whole={str(keep_weights_whole).lower()}"
    run = run_steps(command_line, tmp_path / "run", *REAL, keep, *ladders, *STRATEGIES[strategy])
    assert len(run.steps) == 4
    for step, expected in zip(run.steps, whole.steps, strict=True):
        assert step == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert [figures["val/length"] > 1 for figures in run.validations] == [True]
    assert run.validations == whole.validations
    assert whole.steps[0]["rollout/length"] > 1
    (exported,) = run.directory.rglob("hf/model.safetensors")
    written = load_file(exported)
    assert written.keys() == run.weights.keys()
    for name, weight in written.items():
        assert torch.equal(weight, run.weights[name])
