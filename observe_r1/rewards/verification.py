"""Symbolic equality of answers, decided by math-verify in processes that hostile answers cannot hold up."""

from __future__ import annotations

import json
import math
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import IO, NamedTuple

from observe_r1.answers import MAX_ANSWER_CHARACTERS
from observe_r1.rewards.cost import cost, is_too_costly

MAX_LATEX_CHARACTERS = 4 * MAX_ANSWER_CHARACTERS  # an answer grows when symbols become LaTeX commands
START_SECONDS = 120.0  # a cold file system can take this long to import sympy
QUICK_FRACTION = 0.1  # of the time limit, given to every answer before any gets all of it
MAX_FAILED_STARTS = 3  # in a row
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


def _refuse(comparison: Comparison) -> Verdict | None:
    """The verdict on a comparison that is not worth a process, None for any other."""
    if len(comparison.gold) > MAX_LATEX_CHARACTERS or is_too_costly(comparison.gold):
        return Verdict.UNPARSEABLE_GOLD
    if len(comparison.prediction) > MAX_LATEX_CHARACTERS:
        return Verdict.TOO_LONG
    return Verdict.TIMEOUT if is_too_costly(comparison.prediction) else None


class _Worker:
    """A running worker process and the comparison it is busy with."""

    def __init__(self, memory_bytes: int) -> None:
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed by `stop`
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
        self.deadline = time.monotonic() + START_SECONDS  # when to kill it, infinite while it has nothing to do
        self.answered = 0

    def ask(self, comparison: Comparison, cpu_seconds: float) -> None:
        self.input.write(json.dumps([*comparison, cpu_seconds]).encode() + b"\n")
        self.comparison = comparison
        # the wall clock only catches what the CPU clock of the worker cannot: a busy machine must fail no answer
        self.deadline = time.monotonic() + 3 * cpu_seconds + 3

    def receive(self) -> str:
        """The next word of the worker, empty when it has died."""
        word = self.output.readline().decode().strip()
        self.deadline = math.inf
        return word

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
        self._failed_starts = 0
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _stop_all, self._pool, self._owner)

    def __reduce__(self) -> tuple[type[AnswerVerifier], tuple[int, float, float, int]]:
        """Copies and pickles hold the settings, and start processes of their own."""
        return type(self), (self.workers, self.timeout_seconds, self.batch_timeout_seconds, self.memory_bytes)

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
                self._verify_pending(
                    sorted(pending, key=lambda pair: cost(pair.gold) + cost(pair.prediction)), verdicts
                )
        return [verdicts[comparison] for comparison in comparisons]

    @property
    def processes(self) -> list[int]:
        """The ids of the running worker processes, empty before the first comparison that needs one."""
        return [worker.process.pid for worker in self._pool]

    def close(self) -> None:
        """Ends the processes. The verifier starts new ones when it is used again."""
        with self._lock:
            _stop_all(self._pool, self._owner)

    def _verify_pending(self, pending: list[Comparison], verdicts: dict[Comparison, Verdict]) -> None:
        if self._owner != os.getpid():
            self._leave_to_parent()
        try:
            self._wait_until_ready()
            deadline = time.monotonic() + self.batch_timeout_seconds + SECONDS_PER_ANSWER * len(pending)
            retry = self._run(pending, QUICK_FRACTION * self.timeout_seconds, deadline, verdicts)
            for comparison in self._run(retry, self.timeout_seconds, deadline, verdicts):
                verdicts[comparison] = Verdict.TIMEOUT
        except BaseException:
            _stop_all(self._pool, self._owner)  # a worker that still has an answer to give would answer the next batch
            raise
        for worker in [worker for worker in self._pool if worker.answered >= COMPARISONS_PER_WORKER]:
            self._discard(worker)
        self._start_missing()

    def _run(
        self, comparisons: list[Comparison], cpu_seconds: float, deadline: float, verdicts: dict[Comparison, Verdict]
    ) -> list[Comparison]:
        """Makes comparisons in order; returns those that ran out of CPU time or that the deadline left unasked."""
        queue = deque(comparisons)
        unanswered: list[Comparison] = []
        while queue or any(worker.comparison for worker in self._pool):
            self._kill_overdue(deadline, verdicts)
            if time.monotonic() >= deadline:
                return unanswered + list(queue)
            for worker in list(self._pool):
                if queue and worker.ready and worker.comparison is None:
                    try:
                        worker.ask(queue[0], cpu_seconds)
                        queue.popleft()
                    except BrokenPipeError:
                        self._discard(worker)
            self._start_missing()
            for worker in self._readable(deadline):
                comparison = worker.comparison
                word = self._receive(worker)
                if comparison is None:
                    continue
                if word is None:
                    verdicts[comparison] = self._cause_of_death(worker)
                elif word == Verdict.TIMEOUT:
                    unanswered.append(comparison)
                else:
                    verdicts[comparison] = Verdict(word)
        return unanswered

    def _kill_overdue(self, deadline: float, verdicts: dict[Comparison, Verdict]) -> None:
        now = time.monotonic()
        for worker in list(self._pool):
            if worker.comparison is not None and now >= min(worker.deadline, deadline):
                verdicts[worker.comparison] = Verdict.TIMEOUT
                self._discard(worker)
            elif now >= worker.deadline:
                self._fail_start(worker, f"it was not ready after {START_SECONDS:.0f} s")

    def _readable(self, deadline: float) -> list[_Worker]:
        """The workers that have said something or died, waiting for the first or for a deadline."""
        until = min([deadline, *(worker.deadline for worker in self._pool)])
        with selectors.DefaultSelector() as selector:
            for worker in self._pool:
                selector.register(worker.output, selectors.EVENT_READ, worker)
            return [key.data for key, _ in selector.select(max(0.0, until - time.monotonic()))]

    def _receive(self, worker: _Worker) -> str | None:
        """What a worker says, None when it has died."""
        word = worker.receive()
        worker.comparison = None
        if word == "ready":
            worker.ready = True
            self._failed_starts = 0
        elif not word and not worker.ready:
            self._fail_start(worker, worker.start_error())
        elif not word or word == Verdict.OUT_OF_MEMORY:
            self._discard(worker)
        else:
            worker.answered += 1
        return word or None

    @staticmethod
    def _cause_of_death(worker: _Worker) -> Verdict:
        return Verdict.TIMEOUT if worker.process.returncode == -signal.SIGXCPU else Verdict.WORKER_DIED

    def _wait_until_ready(self) -> None:
        """Waits for one worker that takes comparisons, the others may follow."""
        self._start_missing()
        while not any(worker.ready for worker in self._pool):
            for worker in self._readable(math.inf):
                self._receive(worker)
            self._kill_overdue(math.inf, {})
            self._start_missing()

    def _fail_start(self, worker: _Worker, reason: str) -> None:
        self._discard(worker)
        self._failed_starts += 1
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise RuntimeError(
                f"the process that runs math-verify did not start {MAX_FAILED_STARTS} times in a row "
                f"(memory_bytes={self.memory_bytes}): {reason}"
            )

    def _start_missing(self) -> None:
        while len(self._pool) < self.workers:
            self._pool.append(_Worker(self.memory_bytes))

    def _discard(self, worker: _Worker) -> None:
        self._pool.remove(worker)
        worker.stop()

    def _leave_to_parent(self) -> None:
        """In a forked child: the processes belong to the parent, this one starts its own."""
        self._finalizer.detach()
        self._pool = []
        self._owner = os.getpid()
        self._finalizer = weakref.finalize(self, _stop_all, self._pool, self._owner)


def _stop_all(pool: list[_Worker], owner: int) -> None:
    if os.getpid() == owner:
        while pool:
            pool.pop().stop()
