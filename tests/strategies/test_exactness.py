"""The same global batch gives the same steps under every strategy: two processes on a CPU against one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .conftest import STRATEGIES, needs_deepspeed, run_steps


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_ladder: Path, command_line: Any) -> Any:
    directory = tmp_path_factory.mktemp("alone") / "run"
    return run_steps(command_line, directory, f"--data.ladder={tiny_ladder}", "--trainer.devices=1")


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    ["ddp", "fsdp2", pytest.param("zero2", marks=needs_deepspeed), pytest.param("zero3", marks=needs_deepspeed)],
)
def test_two_ranks_take_the_steps_of_one(
    strategy: str, alone: Any, tmp_path: Path, tiny_ladder: Path, command_line: Any
) -> None:
    run = run_steps(
        command_line,
        tmp_path / "run",
        f"--data.ladder={tiny_ladder}",
        "--trainer.devices=2",
        *STRATEGIES[strategy],
    )
    assert len(run.steps) == 3
    for step, expected in zip(run.steps, alone.steps, strict=True):
        assert step == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert alone.steps[0]["train/gradient_norm"] > 0.01
    assert run.weights.keys() == alone.weights.keys()
    for name, weight in run.weights.items():
        assert (weight - alone.weights[name]).abs().max() <= 2e-5, name
