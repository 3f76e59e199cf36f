"""What the command line says when something raises: a paragraph for whoever typed it, or where the fault lies.

* What this package, Lightning's Trainer or the parser says in a sentence of its own is meant for the user: shown alone.
* What was raised in the user's own code is shown from their first line on.
* Anything else is a fault that has yet to be understood, and keeps its whole traceback.
"""

from __future__ import annotations

import errno
import linecache
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from types import TracebackType

from observe_r1.argument_errors import readable

TRACEBACK_VARIABLE = "OBSERVE_R1_TRACEBACK"  # set to anything: every error with its whole traceback
HINT = f"({TRACEBACK_VARIABLE}=1 shows where it was raised.)"
INSTALLED = {"site-packages", "dist-packages"}  # part of the path of installed packages
STANDARD_LIBRARY = sysconfig.get_path("stdlib")
SPOKEN = (ValueError, RuntimeError, OSError)  # what this package raises to be read

# messages of others that name no remedy, and the remedy
REMEDIES = (
    (
        r"No supported gpu backend|CUDAAccelerator` can not run|requested gpu: \[",
        "This torch sees too few GPUs for trainer.accelerator and trainer.devices (`python -c 'import torch; "
        "print(torch.__version__, torch.cuda.device_count())'` says what it sees): set --trainer.accelerator cpu, "
        "fewer --trainer.devices, or install a torch that is built for your GPU.",
    ),
    (
        r"strategy `fsdp|invalid strategy name",
        "What observe_r1 supports: auto, ddp and fsdp2, and with --config strategies/NAME.yaml: ddp, fsdp2, "
        "deepspeed_zero2, deepspeed_zero3, deepspeed_zero3_offload.",
    ),
    (r"must have DeepSpeed installed", "With the releases that were tried: pip install 'observe-r1[deepspeed]'."),
)


@contextmanager
def reported(command: str) -> Iterator[None]:
    """Ends the process with exit code 1 and a report where the block raises.

    Args:
        command: As the user called it; stands before the report.
    """
    try:
        yield
    except Exception as error:
        report = None if os.environ.get(TRACEBACK_VARIABLE) else report_of(error)
        if report is None:
            raise
        rank = os.environ.get("LOCAL_RANK")
        sys.exit(("" if rank is None else f"[rank{rank}] ") + f"{command}: {report}\n{HINT}")


def report_of(error: BaseException) -> str | None:
    """The paragraph, or the user's part of the traceback; None where the whole traceback is needed."""
    cause: BaseException | None = error
    while cause is not None:
        mine = _from_user_code(cause.__traceback__)
        if mine is not None:
            about = None if cause is error else _sentence(error)  # what it was raised for
            told = "".join(traceback.format_exception(type(cause), cause, mine)).rstrip()
            return "\n".join([*([] if about is None else [about]), "your code raised", told])
        cause = cause.__cause__ or cause.__context__
    message = _sentence(error)
    if message is None:
        return None
    remedies = [remedy for pattern, remedy in REMEDIES if re.search(pattern, message)]
    return "\n".join([message, *remedies, *getattr(error, "__notes__", ())])


def _sentence(error: BaseException) -> str | None:
    """The message, if it was written for the user."""
    module, says_so = _raised_in(error.__traceback__)
    top = module.partition(".")[0]
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return _about_a_file(error)
    if top == "observe_r1" and says_so and isinstance(error, SPOKEN):
        return str(error)
    if top == "jsonargparse":
        return readable(str(error))
    if top == "lightning" and type(error).__name__ == "MisconfigurationException":
        return str(error)
    # the Trainer refuses what does not fit together
    if module.endswith("accelerator_connector") and isinstance(error, ValueError):
        return str(error)
    return None


def _about_a_file(error: OSError) -> str:
    remedy = {
        errno.ENOSPC: "The disk is full: free some space, or write elsewhere.",
        errno.EDQUOT: "Your quota of this disk is used up: free some space, or write elsewhere.",
        errno.EACCES: "You may not do this there: take another path, or ask for the right.",
        errno.EROFS: "This file system is read-only: take another path.",
        errno.ENOTDIR: "A part of this path is a file: take another path.",
    }.get(error.errno or 0, "")
    of_logger = any(".loggers." in frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__))
    where = " Runs are written to trainer.logger.init_args.save_dir." if of_logger else ""
    return f"{error.strerror}: {str(error.filename)!r}. {remedy}{where}".rstrip()


def _raised_in(place: TracebackType | None) -> tuple[str, bool]:
    """Name of the module that raised, and whether by a `raise` of its own: no accident within an expression."""
    if place is None:
        return "", False
    while place.tb_next is not None:
        place = place.tb_next
    frame = place.tb_frame
    line = linecache.getline(frame.f_code.co_filename, place.tb_lineno, frame.f_globals)
    return frame.f_globals.get("__name__", ""), line.lstrip().startswith("raise ")


def _from_user_code(place: TracebackType | None) -> TracebackType | None:
    """The traceback from the first line on that belongs neither to this package nor to an installed one."""
    while place is not None:
        frame = place.tb_frame
        name, path = frame.f_globals.get("__name__", ""), frame.f_code.co_filename
        installed = path.startswith(("<", STANDARD_LIBRARY)) or not INSTALLED.isdisjoint(Path(path).parts)
        if not installed and name.partition(".")[0] not in ("observe_r1", "__main__"):
            return place
        place = place.tb_next
    return None
