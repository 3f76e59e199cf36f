"""A run that is killed and resumed equals one that never was, bit for bit."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from observe_r1.ladder.shards import write_ladder
from observe_r1.quickstart.questions import make_question

# Beside the run, as a user's own file: kills the process without warning at one point of the run, once.
KILLER = """
import os, signal
from pathlib import Path
import lightning as L

class Killer(L.Callback):
    def __init__(self, point: str, count: int):
        self.point, self.count, self.seen = point, count, 0

    def at(self, point):
        self.seen += point == self.point
        if point == self.point and self.seen == self.count and not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def on_rollout_start(self, trainer, module):
        reward = module.rewards.score
        def dying(groups):
            self.at("in_rollout")
            return reward(groups)
        if self.point == "in_rollout":
            module.rewards.score = dying

    def on_train_batch_end(self, *_):
        self.at("after_micro_batch")
"""

BASE = (
    "fit",
    "--config=quickstart.yaml",
    "--trainer.accumulate_grad_batches=2",
    "--trainer.max_epochs=2",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.limit_val_batches=0",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.callbacks=lightning.pytorch.callbacks.ModelCheckpoint",
    "--trainer.callbacks.dirpath=checkpoints",
    "--trainer.callbacks.every_n_train_steps=1",
    "--trainer.callbacks.save_last=true",
    "--trainer.callbacks.save_top_k=0",
    "--trainer.callbacks+=observe_r1.callbacks.RewardLogger",
    "--model.sampling.group_size=4",
    "--model.sampling.max_new_tokens=24",
    "--model.updates.steps_per_rollout=2",
    "--model.updates.epochs_per_rollout=2",
    "--model.kl={coefficient: 0.05, placement: loss, estimator: k3}",
    "--data.class_path=observe_r1.datamodules.NeuraLadderDataModule",
    "--data.prompts_per_rollout=6",
    "--data.workers=0",
)


def final_state(directory: Path) -> dict[str, Any]:
    return dict(torch.load(directory / "checkpoints" / "last.ckpt", weights_only=True))


def assert_equal(one: Any, other: Any, path: str = "") -> None:
    """Bit for bit, through all containers."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_equal(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{path}/{number}")
    else:
        assert one == other, path


def run_to_the_end(command_line: Callable[[Path], Any], directory: Path, arguments: tuple[str, ...]) -> dict[str, Any]:
    directory.mkdir()
    command_line(directory)(*arguments)
    return final_state(directory)


def kill_and_resume(
    command_line: Callable[[Path], Any], directory: Path, arguments: tuple[str, ...], point: str, count: int
) -> dict[str, Any]:
    """Final state of a run that is killed at the `count`-th time it reaches `point`, and resumed."""
    directory.mkdir()
    (directory / "killer.py").write_text(KILLER)
    killer = (
        "--trainer.callbacks+=killer.Killer",
        f"--trainer.callbacks.point={point}",
        f"--trainer.callbacks.count={count}",
    )
    run = command_line(directory)
    run(*arguments, *killer, expect=-9)
    assert (directory / "killed").exists()
    assert (directory / "checkpoints" / "last.ckpt").exists()
    run(*arguments, *killer, "--ckpt_path=checkpoints/last.ckpt")
    return final_state(directory)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, tiny_ladder: Path, command_line: Any) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("uninterrupted")
    command_line(directory)(*BASE, f"--data.ladder={tiny_ladder}")
    return final_state(directory)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "count"),
    [
        ("in_rollout", 2),  # while the second rollout is being scored
        ("after_micro_batch", 4),  # after the second optimizer step of a rollout of four
        ("after_micro_batch", 7),  # between the two micro-batches of an optimizer step
        ("after_micro_batch", 32),  # after the last micro-batch of the first epoch
    ],
)
def test_killed_and_resumed_equals_uninterrupted(
    point: str,
    count: int,
    tmp_path: Path,
    tiny_ladder: Path,
    uninterrupted: dict[str, Any],
    command_line: Callable[[Path], Any],
) -> None:
    arguments = (*BASE, f"--data.ladder={tiny_ladder}")
    assert_same_run(kill_and_resume(command_line, tmp_path / "run", arguments, point, count), uninterrupted)


@pytest.mark.slow
def test_resume_with_adapters_random_order_and_a_worker(
    tmp_path: Path, tiny_ladder: Path, command_line: Callable[[Path], Any]
) -> None:
    """Whatever draws from the global random state has to draw the same after a resume."""
    pytest.importorskip("peft")
    arguments = (
        *BASE,
        "--model.policy.lora={rank: 4}",
        "--data.order=random",
        "--data.workers=1",
        "--trainer.max_epochs=1",
        f"--data.ladder={tiny_ladder}",
    )
    whole = run_to_the_end(command_line, tmp_path / "whole", arguments)
    assert_same_run(kill_and_resume(command_line, tmp_path / "parts", arguments, "after_micro_batch", 13), whole)


@pytest.mark.slow
def test_resume_at_the_end_of_an_epoch_that_bad_samples_cut_short(
    tmp_path: Path, command_line: Callable[[Path], Any]
) -> None:
    """Three of eight samples are damaged: three rollouts instead of four, and the epoch ends before its length."""
    write_ladder([make_question("train", 5, index).prompt() for index in range(8)], tmp_path / "ladder")
    (shard,) = (tmp_path / "ladder").glob("*.tar")
    content = bytearray(shard.read_bytes())
    starts = [place.start() for place in re.finditer(b"IHDR", content)]
    for sample in (2, 3, 4):
        content[starts[sample] : starts[sample] + 12] = bytes(12)
    shard.write_bytes(content)
    arguments = (*BASE, "--data.prompts_per_rollout=2", f"--data.ladder={tmp_path / 'ladder'}")
    whole = run_to_the_end(command_line, tmp_path / "whole", arguments)
    assert whole["global_step"] == 2 * 3 * 4
    assert_same_run(kill_and_resume(command_line, tmp_path / "parts", arguments, "after_micro_batch", 24), whole)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["level", "sample"])
def test_resume_with_adaptive_order_refills_and_a_worker(
    by: str, tmp_path: Path, tiny_ladder: Path, command_line: Callable[[Path], Any]
) -> None:
    """The pass rates decide what is drawn next, so the checkpoint has to hold them; refills draw by them as well."""
    arguments = (
        *BASE,
        "--data.order=adaptive",
        f"--data.adaptive.by={by}",
        "--data.workers=1",
        "--model.filtering.zero_variance=refill",
        "--trainer.max_epochs=1",
        f"--data.ladder={tiny_ladder}",
    )
    whole = run_to_the_end(command_line, tmp_path / "whole", arguments)
    (rank,) = whole["NeuraLadderDataModule"]["ranks"]
    assert float(rank["stream"]["adaptive"]["levels"][1].sum()) > 0
    assert_same_run(kill_and_resume(command_line, tmp_path / "parts", arguments, "after_micro_batch", 13), whole)


@pytest.mark.slow
def test_resume_in_the_middle_of_a_rollout_on_two_ranks(
    tmp_path: Path, tiny_ladder: Path, command_line: Callable[[Path], Any]
) -> None:
    """One rank trains two of the four steps of a rollout, two ranks the others: the same weights up to rounding."""
    arguments = (
        *BASE,
        f"--data.ladder={tiny_ladder}",
        "--trainer.max_steps=4",
        "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
        "--trainer.callbacks.dirpath=halfway",
        "--trainer.callbacks.every_n_train_steps=2",
        "--trainer.callbacks.save_top_k=-1",
    )
    one_rank = run_to_the_end(command_line, tmp_path / "one", arguments)
    (halfway,) = (tmp_path / "one" / "halfway").glob("*step=2.ckpt")
    started = torch.load(halfway, weights_only=True)
    (rank,) = started["NeuraLadderDataModule"]["ranks"]
    assert rank["experience"] is not None
    ranks = ("--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp")
    two_ranks = run_to_the_end(command_line, tmp_path / "two", (*arguments, *ranks, f"--ckpt_path={halfway}"))
    assert two_ranks["global_step"] == one_rank["global_step"] == 4
    states = [run["NeuraLadderDataModule"]["ranks"][0]["stream"] for run in (one_rank, two_ranks)]
    assert states[0] == states[1]
    moved = [max_difference(one_rank, other) for other in (started, two_ranks)]
    assert moved[1] < 0.02 * moved[0], moved


def max_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    weights, others = one["state_dict"], other["state_dict"]
    return max(float((weights[name] - others[name]).abs().max()) for name in weights)


def assert_same_run(resumed: dict[str, Any], uninterrupted: dict[str, Any]) -> None:
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
        assert_equal(resumed[part], uninterrupted[part], part)
    assert_equal(
        resumed["NeuraLadderDataModule"]["ranks"], uninterrupted["NeuraLadderDataModule"]["ranks"], "data module"
    )
    for part in ("rng", "verdicts", "fingerprint"):
        assert_equal(resumed["observe_r1"][part], uninterrupted["observe_r1"][part], part)
    (one,), (other,) = (
        [state for name, state in run["callbacks"].items() if name.startswith("RewardLogger")]
        for run in (resumed, uninterrupted)
    )
    assert_equal(one, other, "reward logger")
