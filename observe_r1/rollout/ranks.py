"""The few words that training ranks exchange about a rollout engine they share. No-ops where there is one rank."""

from __future__ import annotations

import torch


def rank() -> int:
    return torch.distributed.get_rank() if _several() else 0


def world_size() -> int:
    return torch.distributed.get_world_size() if _several() else 1


def from_first_rank(number: int, device: torch.device) -> int:
    """The number that rank 0 gives."""
    if not _several():
        return number
    value = torch.tensor([number], dtype=torch.long, device=device)
    torch.distributed.broadcast(value, src=0)
    return int(value)


def agree(error: Exception | None, device: torch.device) -> None:
    """Waits for all ranks. Raises the error here, and another one on the ranks that have none of their own."""
    if _several():
        failed = torch.tensor([error is not None], dtype=torch.int32, device=device)
        torch.distributed.all_reduce(failed)
        if error is None and int(failed):
            raise RuntimeError("Another rank failed to use the vLLM servers: its error is above or in its own output.")
    if error is not None:
        raise error


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
