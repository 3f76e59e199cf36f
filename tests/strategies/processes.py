"""Functions that run as two ranks, without a trainer."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp


def on_two_ranks(directory: Path, work: Callable[..., None], *arguments: Any) -> None:
    """Calls `work(mesh, *arguments)` in two processes, which find each other by a file in `directory`."""
    meeting = directory / "ranks"
    mp.spawn(_join, (f"file://{meeting}", work, *arguments), nprocs=2)  # type: ignore[no-untyped-call]


def _join(rank: int, meeting: str, work: Callable[..., None], *arguments: Any) -> None:
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    work(dist.init_device_mesh("cpu", (2,)), *arguments)
    gc.collect()  # a sharded model knows the group
    dist.destroy_process_group()  # gloo's threads may abort an interpreter that ends
