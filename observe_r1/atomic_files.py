"""Files and directories that are there whole or not at all: what they replace stays until they are written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

PARTIAL, PREVIOUS = ".partial", ".previous"


@contextmanager
def replaced_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, beside `path`, which takes its place at the end.

    Raises:
        OSError: It cannot be written. `path` is as it was, and what was written is removed.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except Exception as error:
        with suppress(OSError):
            partial.unlink()  # a full disk needs the space
        raise not_written(path, error) from error


@contextmanager
def replaced_directory(path: Path, is_first: bool, barrier: Callable[[], None]) -> Iterator[Path]:
    """A directory for all ranks to write to, which takes the place of `path` when all of them have written.

    A crash leaves the one or the other, at worst under a name that `intact` knows.

    Args:
        path: The same on all ranks.
        is_first: Of all ranks, one moves and removes.
        barrier: Waits for all ranks.

    Raises:
        OSError: This rank cannot write. `path` is as it was.
    """
    partial, previous = (path.with_name(path.name + ending) for ending in (PARTIAL, PREVIOUS))
    if is_first:
        remove(partial)
        partial.mkdir(parents=True)
    barrier()
    try:
        yield partial
    except Exception as error:
        if is_first:
            shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the space
        raise not_written(path, error) from error
    barrier()
    if is_first:
        if path.exists() or path.is_symlink():
            remove(previous)  # not before: after a crash it may be all there is
            path.rename(previous)
        partial.rename(path)
        remove(previous)
    barrier()


def intact(path: str | os.PathLike[str]) -> Path:
    """The directory, or the one before it where a crash came between the two renames that replace it."""
    wanted = Path(path)
    previous = wanted.with_name(wanted.name + PREVIOUS)
    return previous if not wanted.exists() and previous.exists() else wanted


def remove(path: Path) -> None:
    """A file or a directory, where there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def not_written(path: Path, error: BaseException) -> OSError:
    """The error for users, which names the path and what the system said."""
    free = shutil.disk_usage(next(parent for parent in path.absolute().parents if parent.exists())).free
    return OSError(
        f"The checkpoint {str(path)!r} could not be written: {_reason(error)}. {free / 1e9:.1f} GB are free there. "
        "What was saved before is as it was, and --ckpt_path last goes on from there."
    )


def _reason(error: BaseException) -> str:
    """What the system said, which serialisers hide behind errors of their own."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return str(seen)
        of_ranks = getattr(seen, "failures", None)  # torch.distributed.checkpoint; without what caused them
        if of_ranks:
            return "; ".join(f"rank {rank}: {_reason(failure)}" for rank, (failure, _) in sorted(of_ranks.items()))
        seen = seen.__cause__ or seen.__context__
    if any(
        words in str(error) for words in ("unexpected pos", "iostream error")
    ):  # torch, of a write that was cut short
        return "the disk took less than was written, so it is full or a limit on files is reached"
    return f"{type(error).__name__}: {error}"
