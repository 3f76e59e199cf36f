"""How Lightning's checkpoints are written: whole or not at all, and beside the training where that is wanted."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.plugins.io import CheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.distributed.tensor import DTensor

from observe_r1.atomic_files import replaced_directory, replaced_file
from observe_r1.checkpoint import FSDP2_METADATA


class AtomicFiles(TorchCheckpointIO):
    """Writes a checkpoint beside the one that it replaces.

    Lightning writes into the directory for temporary files and moves: from another disk that is a copy, which a crash
    leaves half-way. It also holds two copies in memory.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if storage_options is not None or "://" in str(path):  # object stores show nothing that is not complete
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with replaced_file(Path(path)) as file:
            torch.save(checkpoint, file)


class AsyncCheckpoints(CheckpointIO):
    """Writes checkpoints in a thread while the training goes on: it waits only for a copy in the memory of the CPU.

    Beside Lightning's `AsyncCheckpointIO` it copies to the CPU instead of the GPU, removes older checkpoints only when
    newer ones are written, bounds the copies, and serves FSDP2 too. A write that fails ends the training at the next
    save, or at its end, and nothing is removed any more.

    Args:
        snapshots: Largest number of copies in memory at once; one more save waits. `ModelCheckpoint` with `save_last`
            makes two at a time.
    """

    def __init__(self, snapshots: int = 2) -> None:
        if snapshots < 1:
            raise ValueError(f"AsyncCheckpoints.snapshots is {snapshots}: use 1 or more.")
        self.files = AtomicFiles()
        self._room = threading.Semaphore(snapshots)
        self._thread: ThreadPoolExecutor | None = None  # one, so that everything happens in order
        self._error: BaseException | None = None
        self._failed = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.save_with(lambda copy: self.files.save_checkpoint(copy, path, storage_options), checkpoint)

    def save_with(self, write: Callable[[dict[str, Any]], None], checkpoint: dict[str, Any]) -> None:
        """Calls `write` in the thread with the checkpoint as it is now.

        Raises:
            OSError: An earlier write failed.
        """
        self._room.acquire()
        try:
            self._raise()
            copy = snapshot(checkpoint)
        except BaseException:
            self._room.release()
            raise
        self._submit(partial(write, copy), is_save=True)

    def remove_checkpoint(self, path: Any) -> None:
        self._submit(partial(self.files.remove_checkpoint, path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        self.teardown()
        return self.files.load_checkpoint(path, map_location, weights_only)

    def teardown(self) -> None:
        """Waits until everything is written."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
            self._thread = None
        self._raise()

    def _submit(self, work: Callable[[], None], is_save: bool = False) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._thread.submit(self._run, work, is_save)

    def _run(self, work: Callable[[], None], is_save: bool) -> None:
        try:
            if not self._failed:
                work()
        except BaseException as error:  # nobody looks at what a thread raises
            self._error, self._failed = error, True
        finally:
            if is_save:
                self._room.release()

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error


def snapshot(content: Any) -> Any:
    """A copy of all containers, with copies of all tensors in the memory of the CPU; what shares memory still does."""
    copies: dict[Any, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        if isinstance(tensor, DTensor):
            return tensor.detach().to("cpu", copy=True)
        memory = tensor.untyped_storage().data_ptr()
        key = (memory, tensor.device, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if key not in copies:
            copies[key] = tensor.detach().to("cpu", copy=True)
        return copies[key]

    return apply_to_collection(content, Tensor, copy)


def write_parts(checkpoint: dict[str, Any], path: Path, group: dist.ProcessGroup | None = None) -> None:
    """Every rank its part of a directory, as Lightning's ModelParallelStrategy reads it.

    Args:
        group: Of all ranks; None for the one of the training.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    parts = {"state_dict": checkpoint.pop("state_dict")}
    parts |= {f"optimizer_{index}": state for index, state in enumerate(checkpoint.pop("optimizer_states", []))}
    is_first = dist.get_rank() == 0
    with replaced_directory(path, is_first, lambda: dist.barrier(group)) as directory:
        try:
            save(parts, checkpoint_id=directory, process_group=group)
        except CheckpointException as error:  # of all ranks; no Exception
            raise RuntimeError("Not every rank could write its part.") from error
        if is_first:
            torch.save(checkpoint, directory / FSDP2_METADATA)
