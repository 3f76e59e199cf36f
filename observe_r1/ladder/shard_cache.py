"""Whole remote shards on a local disk, bounded in bytes, shared by every process of a machine."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from observe_r1.ladder.storage import BLOCK_BYTES, Files, read_local

SHARD, PART = ".tar", ".part"


class ShardCache:
    """Keeps shards as they are fetched; the one that was not used for longest makes room for the next.

    Locks are the kernel's (`flock`): those of a process that is killed are gone with it, and what it left unfinished is
    removed by the next one. A `.part` file has the size of its shard from the start, so that all the files together
    never exceed the bound.

    Args:
        directory: Of the cache, and of nothing else.
        max_bytes: Bound on what is kept.
        files: Reads the shards.
    """

    def __init__(self, directory: Path, max_bytes: int, files: Files) -> None:
        self.directory = directory
        self.max_bytes = max_bytes
        self.files = files
        directory.mkdir(parents=True, exist_ok=True)

    def read(self, address: str, size: int, start: int, length: int) -> bytes | None:
        """Bytes of a shard of `size` bytes, which is fetched where it is not here yet; None where it finds no place.

        Raises:
            FileNotFoundError: There is no such shard.
            Unreachable: It could not be fetched.
        """
        path = self._fetched(address, size)
        try:
            return None if path is None else read_local(path, start, length)
        except FileNotFoundError:  # another process needed the room just now
            return None

    def discard(self, address: str, size: int) -> None:
        """Deletes a copy that has been found to be damaged."""
        self._path(address, size).unlink(missing_ok=True)

    def _path(self, address: str, size: int) -> Path:
        return self.directory / f"{hashlib.sha256(f'{address} {size}'.encode()).hexdigest()[:32]}{SHARD}"

    def _fetched(self, address: str, size: int) -> Path | None:
        path = self._path(address, size)
        while not _touch(path):
            if size > self.max_bytes:
                return None
            with _locked(path.with_suffix(PART)) as part:
                if part is None or path.exists():  # another process has fetched it in the meantime
                    continue
                if not self._reserve(part, size):
                    return None
                if not self._download(address, size, part):
                    return None
                with self._alone():  # else another process that adds up sees it under neither name
                    os.replace(path.with_suffix(PART), path)
        return path

    def _reserve(self, part: int, size: int) -> bool:
        """Makes room for a shard of `size` bytes and gives it to the open file `part`."""
        with self._alone():
            kept = []  # (last use, bytes, path)
            used = 0
            for path in self.directory.iterdir():
                if path.suffix not in (SHARD, PART):
                    continue
                with suppress(FileNotFoundError):
                    status = path.stat()
                    if path.suffix == SHARD:
                        kept.append((status.st_mtime_ns, status.st_size, path))
                    elif status.st_ino != os.fstat(part).st_ino and _is_abandoned(path):
                        path.unlink()
                        continue
                    used += status.st_size
            if used - sum(bytes for _, bytes, _ in kept) + size > self.max_bytes:
                return False  # others are fetching that much
            for _, bytes, path in sorted(kept):
                if used + size <= self.max_bytes:
                    break
                path.unlink(missing_ok=True)
                used -= bytes
            os.truncate(part, size)
            return True

    def _alone(self) -> AbstractContextManager[object]:
        """Files get bytes and their names in here only."""
        return _locked(self.directory / "lock", keep=True)

    def _download(self, address: str, size: int, part: int) -> bool:
        """Whether the shard was as long as it should be."""
        for start in range(0, size, BLOCK_BYTES):
            block = self.files.read(address, start, min(BLOCK_BYTES, size - start))
            if len(block) < min(BLOCK_BYTES, size - start):
                return False
            os.pwrite(part, block, start)
        return True


def _touch(path: Path) -> bool:
    """Marks a shard as used just now; False where there is none."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


@contextmanager
def _locked(path: Path, *, keep: bool = False) -> Iterator[int | None]:
    """The open file at `path`, locked; None where another process took it away meanwhile. Deleted unless it is kept."""
    import fcntl

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        mine = _is_at(descriptor, path)
        try:
            yield descriptor if mine else None
        finally:
            if mine and not keep and _is_at(descriptor, path):
                path.unlink()
    finally:
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.fstat(descriptor).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def _is_abandoned(part: Path) -> bool:
    """Whether nobody is fetching into a `.part` file any more."""
    import fcntl

    descriptor = os.open(part, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
