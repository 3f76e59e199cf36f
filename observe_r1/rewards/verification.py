"""Symbolic equality of answers, decided by math-verify in processes that hostile answers cannot hold up."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import IO, NamedTuple

from observe_r1.answers import MAX_ANSWER_CHARACTERS
from observe_r1.rewards.cost import cost, is_too_costly

START_SECONDS = 120.0  # a cold file system can take this long to import sympy
QUICK_FRACTION = 0.1  # of the time limit, given to every answer before any gets all of it
SECONDS_PER_ANSWER = 0.02  # added to the batch limit, about three times what a harmless answer takes
COMPARISONS_PER_WORKER = 5000  # then a fresh process takes over: sympy's caches grow


class Verdict(StrEnum):
    """What became of a prediction; the values are the names of the logged counters."""

    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"  # no complete answer block, or a blank one
    TOO_LONG = "too_long"  # more than `MAX_ANSWER_CHARACTERS`
    TIMEOUT = "timeout"  # out of time, or refused because it would be
    OUT_OF_MEMORY = "out_of_memory"
    WORKER_DIED = "worker_died"  # crashed or ended by the kernel
    UNPARSEABLE_GOLD = "unparseable_gold"  # nothing can be compared with it


class Comparison(NamedTuple):
    """A question to math-verify."""

    gold: str  # LaTeX without delimiters
    prediction: str  # LaTeX without delimiters
    precision: int | None = None  # decimals within half a unit of which numbers are equal


class _Worker:
    """A running worker process and the comparison it is busy with."""

    def __init__(self, memory_bytes: int) -> None:
        self.errors: IO[bytes] = tempfile.TemporaryFile()
        script = str(Path(__file__).with_name("worker.py"))
        self.process = subprocess.Popen(
            [sys.executable, "-P", script, str(memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            bufsize=0,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.input = self.process.stdin
        self.output = self.process.stdout
        self.ready = False
        self.comparison: Comparison | None = None
        self.deadline = time.monotonic() + START_SECONDS
        self.answered = 0

    def assign(self, comparison: Comparison, cpu_seconds: float) -> None:
        self.comparison = comparison
        # the wall clock only catches what the CPU clock of the worker cannot: a busy machine must fail no answer
        self.deadline = time.monotonic() + 3 * cpu_seconds + 3
        self.input.write(json.dumps([*comparison, cpu_seconds]).encode() + b"\n")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.input, self.output, self.errors):
            stream.close()

    def start_error(self) -> str:
        self.errors.seek(0)
        return self.errors.read().decode(errors="replace").strip()[-2000:]


class AnswerVerifier:
    """Compares answers with math-verify, within bounds on time and memory whatever the answers are.

    Worker processes start with the first comparison that needs one. They are separate programs that import math-verify
    only: a script without `if __name__ == "__main__"` is safe, and neither torch nor the CUDA context of the parent
    comes along. They end with `close`, with the verifier, or with the parent process.

    A batch is worked through twice. At first every answer gets a tenth of `timeout_seconds`, cheap-looking ones before
    others, so that harmless answers do not wait behind hostile ones; then those that ran out of time are tried again
    with all of it while the batch limit lasts. An answer whose worker had to be killed is not tried again.

    Args:
        workers: processes.
        timeout_seconds: CPU time for one comparison.
        batch_timeout_seconds: wall time for a batch, beside 0.02 s for each different comparison and the start of
            the processes; what is unanswered then is `Verdict.TIMEOUT`.
        memory_bytes: address space of a process, enforced on Linux.

    Raises:
        ValueError: when an argument is not positive.
    """

    def __init__(
        self,
        workers: int = 2,
        timeout_seconds: float = 1.0,
        batch_timeout_seconds: float = 6.0,
        memory_bytes: int = 2 * 1024**3,
    ) -> None:
        limits = {
            "workers": workers,
            "timeout_seconds": timeout_seconds,
            "batch_timeout_seconds": batch_timeout_seconds,
            "memory_bytes": memory_bytes,
        }
        for name, value in limits.items():
            if value <= 0:
                raise ValueError(f"{name} is {value}; give a positive number")
        self.workers = workers
        self.timeout_seconds = timeout_seconds
        self.batch_timeout_seconds = batch_timeout_seconds
        self.memory_bytes = memory_bytes
        self._pool: list[_Worker] = []
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _stop_all, self._pool, self._owner)

    def verify(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """One verdict per comparison, in order. Equal comparisons are made once.

        Raises:
            RuntimeError: when the worker processes cannot start, with what they printed.
        """
        verdicts: dict[Comparison, Verdict] = {}
        pending: list[Comparison] = []
        for comparison in dict.fromkeys(comparisons):
            refused = _refuse(comparison)
            if refused is None:
                pending.append(comparison)
            else:
                verdicts[comparison] = refused
        if pending:
            with self._lock:
                self._verify_pending(sorted(pending, key=lambda pair: cost(pair.gold) + cost(pair.prediction)), verdicts)
        return [verdicts[comparison] for comparison in comparisons]

    def close(self) -> None:
        """Ends the processes. The verifier starts new ones when it is used again."""
        with self._lock:
            _stop_all(self._pool, self._owner)

    def _verify_pending(self, pending: list[Comparison], verdicts: dict[Comparison, Verdict]) -> None:
        if self._owner != os.getpid():  # in a forked child the processes belong to the parent
            self._pool.clear()
            self._owner = os.getpid()
            self._finalizer.detach()
            self._finalizer = weakref.finalize(self, _stop_all, self._pool, self._owner)
        self._wait_until_ready()
        deadline = time.monotonic() + self.batch_timeout_seconds + SECONDS_PER_ANSWER * len(pending)
        try:
            retry = self._run(pending, QUICK_FRACTION * self.timeout_seconds, deadline, verdicts)
            for comparison in self._run(retry, self.timeout_seconds, deadline, verdicts):
                verdicts[comparison] = Verdict.TIMEOUT
        except BaseException:
            _stop_all(self._pool, self._owner)  # a worker with an answer on the way would answer the next question
            raise
        for worker in [worker for worker in self._pool if worker.answered >= COMPARISONS_PER_WORKER]:
            self._discard(worker)
        self._start_missing()

    def _run(
        self, queued: Iterable[Comparison], cpu_seconds: float, deadline: float, verdicts: dict[Comparison, Verdict]
    ) -> list[Comparison]:
        """Makes comparisons in order and returns those that ran out of CPU time, or that the deadline cut off."""
        queue = deque(queued)
        unanswered: list[Comparison] = []
        while queue or any(worker.comparison for worker in self._pool):
            now = time.monotonic()
            for worker in list(self._pool):
                if worker.comparison is not None and now >= min(worker.deadline, deadline):
                    verdicts[worker.comparison] = Verdict.TIMEOUT
                    self._discard(worker)
            if now >= deadline:
                return unanswered + list(queue)
            self._start_missing()
            for worker in self._pool:
                if queue and worker.ready and worker.comparison is None:
                    self._assign(worker, queue, cpu_seconds)
            for worker, word in self._read(min([deadline, *(worker.deadline for worker in self._pool)])):
                comparison, worker.comparison = worker.comparison, None
                worker.answered += 1
                if comparison is None:
                    continue
                if word == Verdict.TIMEOUT:
                    unanswered.append(comparison)
                else:
                    verdicts[comparison] = Verdict(word)
        return unanswered
