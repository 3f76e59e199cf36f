"""The same global batch gives the same steps under every strategy: two processes on a CPU against one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .conftest import STRATEGIES, needs_deepspeed, run_steps


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_ladder: Path, command_line: Any) -> Any:
    directory = tmp_path_factory.mktemp("alone") / "run"
    return run_steps(command_line, directory, f"--data.ladder={tiny_ladder}", "--trainer.devices=1")


OFF = "--model.updates.balance_ranks=false"
DROP = (  # groups without advantage: a rank may be left with none, or all of them
    "--model.filtering={zero_variance: refill, max_refills: 0}",
    "--model.rewards={even: scripted.EvenLength}",
    "--model.sampling.group_size=2",  # half of all pairs are equal
    "--model.kl.coefficient=0",  # completions without advantage do not pass through the model
    "--model.updates.steps_per_rollout=1",
    "--data.prompts_per_rollout=4",
    "--trainer.max_steps=6",
)


def assert_same_steps(run: Any, alone: Any) -> None:
    assert len(run.steps) == len(alone.steps)
    for step, expected in zip(run.steps, alone.steps, strict=True):
        assert step == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert run.weights.keys() == alone.weights.keys()
    for name, weight in run.weights.items():
        assert (weight - alone.weights[name]).abs().max() <= 2e-5, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("ddp", ()),
        ("ddp", (OFF,)),
        ("fsdp2", ()),
        pytest.param("zero2", (), marks=needs_deepspeed),
        pytest.param("zero3", (), marks=needs_deepspeed),
    ],
)
def test_two_ranks_take_the_steps_of_one(
    strategy: str, options: tuple[str, ...], alone: Any, tmp_path: Path, tiny_ladder: Path, command_line: Any
) -> None:
    run = run_steps(
        command_line,
        tmp_path / "run",
        f"--data.ladder={tiny_ladder}",
        "--trainer.devices=2",
        "--trainer.callbacks+=scripted.Dealt",
        *STRATEGIES[strategy],
        *options,
    )
    assert len(run.steps) == 3
    assert_same_steps(run, alone)
    assert alone.steps[0]["train/gradient_norm"] > 0.01
    if not options:
        check_what_was_dealt(run.directory)


def what_was_dealt(directory: Path) -> list[list[dict[str, Any]]]:
    """What `scripted.Dealt` has written, rollout by rollout, of each of two ranks."""
    return [json.loads((directory / f"dealt{rank}.json").read_text()) for rank in (0, 1)]


def check_what_was_dealt(directory: Path) -> None:
    """Groups moved and were split between ranks, and each belongs to one of them."""
    moved, split = 0, 0
    for one, other in zip(*what_was_dealt(directory), strict=True):
        sampled = [*one["sampled"], *other["sampled"]]
        assert len(sampled) == len(set(sampled)) == 8
        trained = [tuple(item) for rank in (one, other) for item in rank["trained"]]
        assert len(trained) == len(set(trained)) == 4 * 8
        moved += len(one["received"]) + len(other["received"])
        split += len({position for position, _ in one["trained"]} & {position for position, _ in other["trained"]})
    assert moved
    assert split


@pytest.mark.slow
def test_ranks_that_keep_different_numbers_of_groups_take_the_steps_of_one(
    tmp_path: Path, tiny_ladder: Path, command_line: Any
) -> None:
    ladder = f"--data.ladder={tiny_ladder}"
    alone = run_steps(command_line, tmp_path / "alone", ladder, "--trainer.devices=1", *DROP)
    two = ("--trainer.devices=2", "--trainer.callbacks+=scripted.Dealt", *STRATEGIES["ddp"])
    run = run_steps(command_line, tmp_path / "two", ladder, *two, *DROP)
    assert_same_steps(run, alone)
    kept = []
    for one, other in zip(*what_was_dealt(run.directory), strict=True):
        trained = {position for position, _ in [*one["trained"], *other["trained"]]}
        kept.append([len(trained & set(rank["sampled"])) for rank in (one, other)])
    assert any(min(counts) == 0 < max(counts) for counts in kept)
    assert any(0 < min(counts) < max(counts) for counts in kept)
