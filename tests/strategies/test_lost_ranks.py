"""One of two ranks is killed in the middle of training: the run ends soon, says so, leaves nobody, and resumes."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from observe_r1.callbacks.cluster.lost_ranks import how_it_ended

from .conftest import BASE, STRATEGIES, run_steps
from .test_checkpoints import SAVING

LIMIT = 60.0  # seconds from the death of a rank to the end of the others


def lives(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return "\nState:\tZ" not in status and "\nState:\tX" not in status


def wait_for_the_end_of(processes: list[int], deadline: float) -> None:
    """The kernel closes a process's output a moment before it ends the process."""
    while any(map(lives, processes)):
        assert time.time() < deadline, f"{[*filter(lives, processes)]} of the ranks {processes} still live"
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends ranks without a launcher only on Linux")
@pytest.mark.parametrize(
    ("killed", "others_hang"), [(1, False), (1, True), (0, True)], ids=["noticed", "unnoticed", "launcher"]
)
def test_a_lost_rank_ends_the_run_which_resumes(
    killed: int, others_hang: bool, tmp_path: Path, tiny_ladder: Path, command_line: Any
) -> None:
    arguments = (*SAVING, f"--data.ladder={tiny_ladder}", *STRATEGIES["ddp"])
    losing = ("--trainer.callbacks+=scripted.LostRank", f"--trainer.callbacks.rank={killed}")
    losing += ("--trainer.callbacks.step=2", f"--trainer.callbacks.others_hang={str(others_hang).lower()}")
    shutil.copy(Path(__file__).with_name("scripted.py"), tmp_path)
    output = command_line(tmp_path)(*BASE, *arguments, *losing, expect=None if others_hang else 1)
    processes = [int((tmp_path / f"process{rank}").read_text()) for rank in (0, 1)]
    wait_for_the_end_of(processes, (tmp_path / "killed").stat().st_mtime + LIMIT)
    if killed == 1 and others_hang:
        assert f"[rank: 1] Child process with PID {processes[1]} terminated with code -9" in output
    elif killed == 1:
        assert f"Rank 1 (process {processes[1]}) was ended by SIGKILL" in output
    if not others_hang:
        run = run_steps(command_line, tmp_path, *arguments, "--ckpt_path=checkpoints/last.ckpt")
        assert len(run.steps) == 3  # of four: the rank died before the second was saved


def test_endings_in_words() -> None:
    assert "exit code 3" in how_it_ended(3)
    killed, asked = how_it_ended(-9), how_it_ended(-15)
    assert "SIGKILL" in killed
    assert "memory" in killed
    assert "SIGTERM" in asked
    assert "memory" not in asked
