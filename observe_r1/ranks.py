"""What ranks tell each other beside Lightning's own reductions. All of them have to call; alone, one answers itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PIECE_BYTES = 2**28  # of what ranks send each other, on a device at a time


def rank() -> int:
    """Of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def leave() -> None:
    """Ends this process's part in the group, at its end. Otherwise gloo's threads may abort it: exit code -6.

    Lightning does it for NCCL only.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(values: Tensor, device: torch.device) -> Tensor:
    """A tensor on the CPU, added up over all ranks."""
    if world_size() == 1:
        return values
    added = values.to(device, copy=True)
    dist.all_reduce(added)
    return added.cpu()


def largest_over_ranks(number: int, device: torch.device) -> int:
    """Maximum of a number over all ranks."""
    if world_size() == 1:
        return number
    value = torch.tensor(number, device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value)


def smallest_over_ranks(number: int, device: torch.device) -> int:
    """Minimum of a number over all ranks."""
    return -largest_over_ranks(-number, device)


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on some rank."""
    return bool(largest_over_ranks(int(flag), device))


def over_ranks(value: Any) -> list[Any]:
    """What every rank gives, on all of them."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_first_rank(number: int, device: torch.device) -> int:
    """The number that rank 0 gives."""
    if not dist.is_initialized():
        return number
    value = torch.tensor(number, device=device)
    dist.broadcast(value, src=0)
    return int(value)


def agree(error: Exception | None, device: torch.device) -> None:
    """Waits for all ranks. Raises the error here, and another one on the ranks that have none of their own."""
    failed = any_rank(error is not None, device)
    if error is not None:
        raise error
    if failed:
        raise RuntimeError("Another rank failed: its error is above or in its own output.")


def exchange(parcels: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """What every rank has for this one, [bytes] uint8 each on the CPU: point to point, in bounded pieces.

    Args:
        parcels: [bytes] uint8 for each rank.
        device: Where the backend wants tensors. It holds pieces of the parcels, at most `PIECE_BYTES` in either
            direction.
    """
    sizes = torch.tensor([len(parcel) for parcel in parcels], device=device)
    expected = torch.empty_like(sizes)
    dist.all_to_all_single(expected, sizes)
    arrived = [torch.empty(size, dtype=torch.uint8) for size in expected.tolist()]
    piece = PIECE_BYTES // len(parcels)
    for start in range(0, largest_over_ranks(int(sizes.max()), device), piece):
        going = [parcel[start : start + piece] for parcel in parcels]
        coming = [parcel[start : start + piece] for parcel in arrived]  # views
        received = torch.empty(sum(map(len, coming)), dtype=torch.uint8, device=device)
        dist.all_to_all_single(received, torch.cat(going).to(device), [*map(len, coming)], [*map(len, going)])
        for part, came in zip(coming, received.cpu().split([*map(len, coming)]), strict=True):
            part.copy_(came)
    return arrived
