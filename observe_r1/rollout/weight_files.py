"""Weights on their way to vLLM servers, as safetensors in a directory that both sides see."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

MANIFEST = "complete.json"  # written last: a directory without it is not whole
PARTIAL = ".partial"
PRIVATE = "observe-r1-weights"
BUCKET_BYTES = 2**30  # of weights in memory at a time


class WeightFiles:
    """Directories of weights below one place, a new one for every version.

    A version appears under its name in one step, when all of it is there: a reader finds it whole or not at all.

    Args:
        place: Directory that trainer and servers see under the same path. It belongs to one run: what an earlier one,
            perhaps killed, has left there is removed. None: a private one among the system's temporary files.
    """

    def __init__(self, place: str | None = None) -> None:
        self._is_private = place is None
        self.place = (_private_place() if place is None else Path(place)).absolute()
        self.current: Path | None = None
        self.keep_only_current()

    def write(self, weights: Iterable[tuple[str, Tensor]], version: str) -> Path:
        """Writes a version and gives its directory. The version before stays until `keep_only_current`."""
        partial = self.place / f"{version}{PARTIAL}"
        partial.mkdir(parents=True)
        try:
            sizes = _write_buckets(weights, partial)
            (partial / MANIFEST).write_text(json.dumps({"version": version, "bytes": sizes}))
            self.current = partial.rename(self.place / version)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return self.current

    def keep_only_current(self) -> None:
        """Removes all other versions, whole or not."""
        for directory in self.place.iterdir() if self.place.is_dir() else ():
            is_ours = directory.name.endswith(PARTIAL) or (directory / MANIFEST).is_file()
            if directory != self.current and is_ours:
                shutil.rmtree(directory, ignore_errors=True)

    def remove(self) -> None:
        """Removes every version, and a private place with them."""
        self.current = None
        self.keep_only_current()
        if self._is_private:
            shutil.rmtree(self.place, ignore_errors=True)


def _private_place() -> Path:
    """A new directory among the temporary files, gone with this process; those of killed ones are removed."""
    for left in Path(tempfile.gettempdir()).glob(f"{PRIVATE}-*"):
        process = left.name.removeprefix(f"{PRIVATE}-").partition("-")[0]
        if process.isdigit() and not _is_running(int(process)):
            shutil.rmtree(left, ignore_errors=True)
    place = Path(tempfile.mkdtemp(prefix=f"{PRIVATE}-{os.getpid()}-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return place


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def check_directory(directory: Path) -> list[Path]:
    """The files of a version.

    Raises:
        ValueError: One is missing or has another size than was written.
    """
    manifest = directory / MANIFEST
    if not manifest.is_file():
        raise ValueError(f"No weights in {directory}: is it on a disk that this server shares with the trainer?")
    sizes: dict[str, int] = json.loads(manifest.read_text())["bytes"]
    for name, size in sizes.items():
        found = (directory / name).stat().st_size if (directory / name).is_file() else None
        if found != size:
            raise ValueError(f"Weights in {directory}: {name} has {found} bytes, and {size} were written.")
    return [directory / name for name in sizes]


def _write_buckets(weights: Iterable[tuple[str, Tensor]], directory: Path) -> dict[str, int]:
    from safetensors.torch import save_file

    sizes: dict[str, int] = {}
    bucket: dict[str, Tensor] = {}

    def flush() -> None:
        file = directory / f"{len(sizes):05d}.safetensors"
        save_file(bucket, file)
        sizes[file.name] = file.stat().st_size
        bucket.clear()

    held = 0
    for name, weight in weights:
        size = weight.numel() * weight.element_size()
        if bucket and held + size > BUCKET_BYTES:
            flush()
            held = 0
        bucket[name] = weight.cpu().contiguous()
        held += size
    if bucket:
        flush()
    return sizes
