"""Wall seconds by phase of the training."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class PhaseClock:
    """Adds up seconds under names; `last` holds those since the last call of `restart`."""

    def __init__(self) -> None:
        self.total: defaultdict[str, float] = defaultdict(float)
        self.last: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Counts the time inside the context under `phase`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(phase, time.perf_counter() - start)

    def add(self, phase: str, seconds: float) -> None:
        self.total[phase] += seconds
        self.last[phase] += seconds

    def restart(self) -> None:
        self.last.clear()
