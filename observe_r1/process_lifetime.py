"""Processes that end with the one that started them (on Linux; elsewhere nothing happens)."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

LAUNCHER = "OBSERVE_R1_LAUNCHER"  # process id of the rank that starts the others of its node
SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG in prctl(2)


def end_with_parent() -> None:
    """Asks the kernel to end this process when its parent is gone, however that ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def is_started_by_rank() -> bool:
    """Lightning runs on this machine as one rank, which started this one."""
    return os.environ.get(LAUNCHER, str(os.getpid())) != str(os.getpid())


def end_with_launcher() -> None:
    """Ties a rank that Lightning starts to the one that starts it: in a collective it could wait for hours.

    Ranks that torchrun or a cluster starts are theirs to end.
    """
    if "LOCAL_RANK" not in os.environ:
        os.environ[LAUNCHER] = str(os.getpid())
    elif LAUNCHER in os.environ and os.environ["LOCAL_RANK"] != "0":
        end_with_parent()
        if os.environ[LAUNCHER] != str(os.getppid()):
            sys.exit(f"Rank {os.environ['LOCAL_RANK']} ends: the process that started it is gone.")
