"""Ranks on "two nodes" of one machine: torchrun's agents, and tasks that see what srun would tell them.

Runs what docs/multi_node.md describes, as far as one machine can.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from observe_r1.callbacks.cluster.preemption import EXIT_CODE

from ..ports import free_port
from .conftest import BASE, STRATEGIES, Run, run_steps
from .test_checkpoints import SAVING, same_weights

TWO_NODES = ("--trainer.devices=1", "--trainer.num_nodes=2")


def run_both(
    directories: Sequence[Path], commands: Sequence[Sequence[str]], variables: Sequence[dict[str, str]] = ({}, {})
) -> list[str]:
    """Output of two commands that run at the same time, each in its directory; its last line is the exit code."""
    for directory in directories:
        directory.mkdir(exist_ok=True)
        shutil.copy(Path(__file__).with_name("scripted.py"), directory)
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "COLUMNS": "200"}
    files = [directory / f"output{number}" for number, directory in enumerate(directories)]
    started = [
        subprocess.Popen(
            command, cwd=directory, env={**shared, **of_process}, stdout=file.open("w"), stderr=subprocess.STDOUT
        )
        for directory, command, of_process, file in zip(directories, commands, variables, files, strict=True)
    ]
    until = time.monotonic() + 400
    while time.monotonic() < until and any(process.poll() is None for process in started):
        time.sleep(0.2)
    for process in started:
        process.kill()
        process.wait()
    return [f"{file.read_text()}\n{process.returncode}" for file, process in zip(files, started, strict=True)]


def torchrun(node: int, port: int, *command: str) -> list[str]:
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", f"--node-rank={node}"]
    return [*agent, "--rdzv-backend=static", "--master-addr=127.0.0.1", f"--master-port={port}", *command]


def srun_variables(task: int, port: int) -> dict[str, str]:
    """What srun sets for one of two tasks on two nodes, and Lightning reads."""
    return {
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "observe-r1",
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_PROCID": str(task),
        "SLURM_NODEID": str(task),
        "SLURM_LOCALID": "0",
        "MASTER_PORT": str(port),
    }


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory, tiny_ladder: Path, command_line: Any) -> Run:
    """Two ranks that Lightning starts on one node."""
    directory = tmp_path_factory.mktemp("launched") / "run"
    return run_steps(command_line, directory, *SAVING, f"--data.ladder={tiny_ladder}", *STRATEGIES["ddp"])


@pytest.mark.slow
def test_two_agents_of_torchrun_train_like_one_node(launched: Run, tmp_path: Path, tiny_ladder: Path) -> None:
    fit = (*BASE, *SAVING, f"--data.ladder={tiny_ladder}", *STRATEGIES["fsdp2"], *TWO_NODES)
    port = free_port()
    commands = [
        torchrun(0, port, "-m", "observe_r1", *fit),
        torchrun(1, port, "--no-python", sys.executable, "-m", "observe_r1", *fit),  # as `--no-python observe-r1`
    ]
    for output in run_both([tmp_path / "run"] * 2, commands):
        assert output.endswith("\n0"), output[-4000:]
    weights = torch.load(tmp_path / "run/weights.pt")
    assert weights.keys() == launched.weights.keys()
    for name, weight in weights.items():  # FSDP2 against DDP: sums in another order
        assert (weight - launched.weights[name]).abs().max() <= 2e-5, name
    assert [path.name for path in (tmp_path / "run/logs/quickstart").iterdir()] == ["version_0"]


@pytest.mark.slow
def test_parts_of_checkpoints_on_disks_of_their_own_are_refused(tmp_path: Path, tiny_ladder: Path) -> None:
    fit = (*BASE, *SAVING, f"--data.ladder={tiny_ladder}", *STRATEGIES["fsdp2"], *TWO_NODES)
    fit += ("--trainer.callbacks.dirpath=null", "--trainer.callbacks+=scripted.Impatient")
    port = free_port()
    commands = [torchrun(node, port, "-m", "observe_r1", *fit) for node in (0, 1)]
    for output in run_both([tmp_path / "one", tmp_path / "other"], commands):
        assert "Some node does not see the checkpoints of the first one in " in output, output[-4000:]
    assert not list(tmp_path.rglob("*.ckpt*"))  # nothing was trained


@pytest.mark.slow
def test_a_checkpoint_that_one_node_alone_finds_is_refused(tmp_path: Path, tiny_ladder: Path) -> None:
    fit = (*BASE, *SAVING, f"--data.ladder={tiny_ladder}", *STRATEGIES["ddp"], *TWO_NODES, "--ckpt_path=last")
    (tmp_path / "one" / "checkpoints").mkdir(parents=True)
    (tmp_path / "one" / "checkpoints" / "last.ckpt").touch()
    port = free_port()
    commands = [torchrun(node, port, "-m", "observe_r1", *fit) for node in (0, 1)]
    for output in run_both([tmp_path / "one", tmp_path / "other"], commands):
        assert "ckpt_path is not the same for all ranks: " in output, output[-4000:]
        assert "one/checkpoints/last.ckpt, None. Keep checkpoints on a disk" in output


@pytest.mark.slow
def test_tasks_of_slurm_end_at_a_signal_and_continue_exactly(launched: Run, tmp_path: Path, tiny_ladder: Path) -> None:
    """The signal reaches one task, in the middle of an optimizer step; the job is queued again and picks up `last`."""
    fit = (*BASE, *SAVING, f"--data.ladder={tiny_ladder}", *STRATEGIES["ddp"], *TWO_NODES, "--ckpt_path=last")
    fit += ("--trainer.callbacks+=scripted.Signalled", "--trainer.callbacks.rank=1", "--trainer.callbacks.step=3")
    command = [sys.executable, "-m", "observe_r1", *fit, "--trainer.callbacks.number=SIGUSR1"]
    directory = tmp_path / "run"
    port = free_port()
    variables = [srun_variables(task, port) for task in (0, 1)]
    first, second = run_both([directory] * 2, [command] * 2, variables)
    assert first.endswith(f"\n{EXIT_CODE}"), first[-4000:]
    assert second.endswith(f"\n{EXIT_CODE}"), second[-4000:]
    assert "Ended by a signal to another rank after step 3" in first
    assert torch.load(directory / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 3
    for output in run_both([directory] * 2, [command] * 2, variables):
        assert output.endswith("\n0"), output[-4000:]
    assert same_weights(torch.load(directory / "weights.pt"), launched.weights)
