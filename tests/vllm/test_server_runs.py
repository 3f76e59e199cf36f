"""Whole trainings on vLLM servers, from the command line: ahead or not, killed or not, on one rank or two."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from .comparison import NEEDS_VLLM
from .servers import Server

pytestmark = NEEDS_VLLM

# Beside the run, as a user's own file: notes which prompts were trained on with which tokens, and has something happen
# in the middle of training, once.
NOTES = """
import json, os, signal
from pathlib import Path
import lightning as L

class Notes(L.Callback):
    def on_rollout_end(self, trainer, module, experience):
        line = {
            "step": trainer.global_step,
            "behind": experience.metrics["rollout/steps_behind"],
            "positions": [group.prompt.prompt.position for group in experience.groups],
            "tokens": [[c.token_ids.tolist() for c in group.completions] for group in experience.groups],
            "parity": experience.metrics.get("parity/max"),
        }
        with Path(f"notes-{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\\n")

class Killer(L.Callback):
    def __init__(self, batches: int):
        self.batches, self.seen = batches, 0

    def on_train_batch_end(self, *_):
        self.seen += 1
        if self.seen == self.batches and not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)

class ServerKiller(L.Callback):
    def __init__(self, process: int, rollout: int):
        self.process, self.rollout, self.seen = process, rollout, 0

    def on_rollout_start(self, *_):
        self.seen += 1
        if self.seen == self.rollout and not Path("killed").exists():
            Path("killed").touch()
            os.killpg(self.process, signal.SIGKILL)
"""

BASE = (
    "fit",
    "--config=quickstart.yaml",
    "--config=rollout/vllm_server.yaml",
    "--trainer.accumulate_grad_batches=2",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.limit_val_batches=0",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
    "--trainer.callbacks.dirpath=checkpoints",
    "--trainer.callbacks.every_n_train_steps=1",
    "--trainer.callbacks.save_last=true",
    "--trainer.callbacks.save_top_k=0",
    "--trainer.callbacks+=notes.Notes",
    "--model.sampling.group_size=4",
    "--model.sampling.max_new_tokens=24",
    "--model.updates.steps_per_rollout=2",
    "--model.prompt.min_pixels=3136",
    "--model.prompt.max_pixels=19600",
    "--model.rollout.recovery_seconds=15",
    "--data.class_path=observe_r1.datamodules.NeuraLadderDataModule",
    "--data.prompts_per_rollout=6",
    "--data.workers=0",
)


def arguments(ladder: Path, servers: list[Server], *further: str) -> tuple[str, ...]:
    addresses = json.dumps([server.url for server in servers])
    return (*BASE, f"--data.ladder={ladder}", f"--model.rollout.servers={addresses}", *further)


def prepared(directory: Path, command_line: Any) -> Callable[..., str]:
    directory.mkdir()
    (directory / "notes.py").write_text(NOTES)
    run: Callable[..., str] = command_line(directory)
    return run


def notes(directory: Path, rank: int = 0) -> dict[int, dict[str, Any]]:
    """What each rollout was, by the step it was trained at; of one that was collected twice, the last time."""
    lines = (directory / f"notes-{rank}.jsonl").read_text().splitlines()
    return {line["step"]: line for line in map(json.loads, lines)}


def weights(directory: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(directory / "checkpoints" / "last.ckpt", weights_only=True)
    return dict(checkpoint["state_dict"])


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_a_killed_and_resumed_training_equals_an_uninterrupted_one(
    tmp_path: Path, tiny_ladder: Path, command_line: Any, servers: list[Server], steps_ahead: int
) -> None:
    """With the next rollout on its way when it is killed, too."""
    line = arguments(tiny_ladder, servers, f"--model.rollout.async_steps={steps_ahead}")
    prepared(tmp_path / "whole", command_line)(*line)
    run = prepared(tmp_path / "killed", command_line)
    killer = ("--trainer.callbacks+=notes.Killer", "--trainer.callbacks.batches=7")  # in the middle of a rollout
    run(*line, *killer, expect=-9)
    run(*line, *killer, "--ckpt_path=checkpoints/last.ckpt")
    whole, killed = notes(tmp_path / "whole"), notes(tmp_path / "killed")
    assert [note["positions"] for note in whole.values()] == [list(range(n, n + 6)) for n in range(0, 24, 6)]
    assert [note["behind"] for note in whole.values()] == [0.0, *[2.0 * steps_ahead] * 3]
    for step, note in whole.items():
        assert killed[step]["positions"] == note["positions"]
        assert killed[step]["tokens"] == note["tokens"]
    # the last rollout of an epoch is sampled ahead of no other, so nothing is transferred for one
    parities = [note["parity"] for note in whole.values()][: 4 - steps_ahead]
    assert all(parity < 1e-4 for parity in parities)
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    # not bit for bit: what a server computes at the same time depends on what arrives at the same time
    assert all(torch.allclose(one[name], other[name], rtol=0, atol=1e-5) for name in one)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_training_outlives_one_of_its_servers(
    tmp_path: Path, tiny_ladder: Path, command_line: Any, servers: list[Server], ranks: int
) -> None:
    several = ("--trainer.accelerator=cpu", f"--trainer.devices={ranks}", "--trainer.strategy=ddp")
    line = arguments(tiny_ladder, servers, *(several if ranks > 1 else ()))
    killer = (
        "--trainer.callbacks+=notes.ServerKiller",
        f"--trainer.callbacks.process={servers[0].process.pid}",
        "--trainer.callbacks.rollout=2",
    )
    output = prepared(tmp_path / "run", command_line)(*line, *killer)
    assert "did not take over the new weights" in output or "go to other servers" in output
    shares = [notes(tmp_path / "run", rank) for rank in range(ranks)]
    for step, first in enumerate(range(0, 24, 6)):
        drawn = sorted(position for share in shares for position in share[2 * step]["positions"])
        assert drawn == list(range(first, first + 6))
    assert all(note["parity"] < 1e-4 for share in shares for note in share.values())


def test_without_its_server_a_training_ends_with_an_error_and_resumes_exactly(
    tmp_path: Path, tiny_ladder: Path, command_line: Any, servers: list[Server]
) -> None:
    line = arguments(tiny_ladder, servers[:1])
    prepared(tmp_path / "whole", command_line)(*line)
    run = prepared(tmp_path / "broken", command_line)
    killer = (
        "--trainer.callbacks+=notes.ServerKiller",
        f"--trainer.callbacks.process={servers[0].process.pid}",
        "--trainer.callbacks.rollout=3",
    )
    output = run(*line, *killer, expect=1)
    assert "No vLLM server" in output
    assert "resume from the last checkpoint" in output
    servers[0].kill()
    servers[0].start()
    servers[0].wait()
    run(*line, "--ckpt_path=checkpoints/last.ckpt")
    whole, broken = notes(tmp_path / "whole"), notes(tmp_path / "broken")
    assert [note["tokens"] for note in whole.values()] == [note["tokens"] for note in broken.values()]
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.allclose(one[name], other[name], rtol=0, atol=1e-5) for name in one)


def test_two_ranks_share_the_servers(
    tmp_path: Path, tiny_ladder: Path, command_line: Any, servers: list[Server]
) -> None:
    two = ("--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp")
    line = arguments(tiny_ladder, servers, "--model.rollout.async_steps=1", *two)
    prepared(tmp_path / "run", command_line)(*line)
    ranks = [notes(tmp_path / "run", rank) for rank in (0, 1)]
    for step, first in enumerate(range(0, 24, 6)):
        assert ranks[0][2 * step]["positions"] == [first, first + 2, first + 4]
        assert ranks[1][2 * step]["positions"] == [first + 1, first + 3, first + 5]
    assert all(note["parity"] < 1e-4 for rank in ranks for note in list(rank.values())[:3])
