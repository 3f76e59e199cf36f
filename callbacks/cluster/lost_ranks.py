"""Tells which rank was lost when another one fails because of it."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence

import lightning as L

from observe_r1.callbacks.health import SickRun

PATIENCE = 3.0  # seconds; a rank that raised needs them to end
LAST_WORDS = 60.0  # seconds that a rank which failed still has when another one has failed as well


class LostRanks(L.Callback):
    """Adds to an error of the first rank of a node which of the ranks that it started have ended, and how.

    Backends only say that a connection is closed. Part of every run of the command line.
    """

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        started = take_from_observer(trainer) if isinstance(exception, Exception) else []
        if not isinstance(exception, RuntimeError) or isinstance(exception, SickRun):  # not what collectives raise
            return
        until = time.monotonic() + PATIENCE
        while started and all(process.poll() is None for process in started) and time.monotonic() < until:
            time.sleep(0.1)
        for rank, process in enumerate(started, start=trainer.global_rank + 1):
            if process.poll():
                exception.add_note(f"Rank {rank} (process {process.pid}) {how_it_ended(process.returncode)}")


def take_from_observer(trainer: L.Trainer) -> list[subprocess.Popen[bytes]]:
    """The ranks that this one started, if any, which Lightning does not watch any more.

    It looks every five seconds whether one of them has failed, and then kills all of them and this process, also when
    this one is just about to say what happened, or saves a checkpoint. From here on it has `LAST_WORDS` for that.
    """
    watched = getattr(trainer.strategy.launcher, "procs", [])
    started = [process for process in watched if isinstance(process, subprocess.Popen)]
    if started:
        watched.clear()
        threading.Thread(target=observe, args=[started], daemon=True).start()
    return started


def observe(started: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ends this process and those it started a while after one of them has failed: collectives may wait for hours."""
    while not any(process.poll() for process in started):
        time.sleep(1.0)
    time.sleep(LAST_WORDS)
    for process in started:
        process.kill()
    os.kill(os.getpid(), signal.SIGKILL)


def how_it_ended(exit_code: int) -> str:
    """In words; negative exit codes are signals, as in `subprocess`."""
    if exit_code > 0:
        return f"ended with exit code {exit_code}. Its own error is above, after [rank."
    name = signal.Signals(-exit_code).name
    hint = " If nobody sent it: the kernel does when memory runs out, see dmesg." if name == "SIGKILL" else ""
    return f"was ended by {name}.{hint} With --ckpt_path the run goes on from its last checkpoint."
