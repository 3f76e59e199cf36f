"""The most memory that was in use while something ran, on a GPU or in this process."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import torch

STATUS, CLEAR_REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # what clear_refs takes to set the peak back to what is in use, see proc(5)


class PeakMemory:
    """Measures inside of a `with` block, in bytes: what torch allocated on a GPU, resident memory on the CPU (Linux).

    Attributes:
        before: In use at the start.
        peak: The most in use until the end.
        available: That the device has in all.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.before = 0
        self.peak = 0

    @property
    def available(self) -> int:
        if self.device.type == "cuda":
            return int(torch.cuda.get_device_properties(self.device).total_memory)
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    @staticmethod
    def is_measured(device: torch.device | str) -> bool:
        """Whether this machine tells the peak."""
        return torch.device(device).type == "cuda" or os.access(CLEAR_REFERENCES, os.W_OK)

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            CLEAR_REFERENCES.write_text(RESET_PEAK)
            self.before = _status("VmRSS")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
        else:
            self.peak = _status("VmHWM")


def _status(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
