"""Paired runs: cases run alternately in processes of their own, and ratios are taken within a round.

A shared machine changes its pace over minutes. Cases of one round see about the same pace, so the ratio of a round is
steadier than the times it is made of, and the median over rounds forgives the round in which it was not.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Result = dict[str, Any]
"""The JSON object that a case prints as its last line."""


@dataclass(frozen=True)
class Ratio:
    """How many times as much the slow case needs as the fast one."""

    name: str
    rounds: list[float]
    target: float

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def reached(self) -> bool:
        return self.median >= self.target

    def to_document(self) -> Result:
        return {
            "ratio": self.name,
            "median": round(self.median, 3),
            "rounds": [round(value, 3) for value in self.rounds],
            "target": self.target,
            "reached": self.reached,
        }


def run_case(command: Sequence[str], threads: int) -> Result:
    """Runs a case with that many threads.

    Raises:
        RuntimeError: It failed, or printed no JSON object; the message has the end of its output.
    """
    finished = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = finished.stdout.strip().splitlines()
    if finished.returncode or not lines:
        raise RuntimeError(f"{' '.join(command)} failed:\n{(finished.stdout + finished.stderr)[-4000:]}")
    result: Result = json.loads(lines[-1])
    return result


def run_rounds(commands: Mapping[str, Sequence[str]], rounds: int, threads: int) -> Iterator[dict[str, Result]]:
    """Results by case, round after round: A-B-A-B."""
    for _ in range(rounds):
        yield {case: run_case(command, threads) for case, command in commands.items()}


def paired_ratio(
    name: str,
    rounds: Sequence[Mapping[str, Result]],
    slow: str,
    fast: str,
    value: Callable[[Result], float],
    target: float,
) -> Ratio:
    """The ratio slow / fast of `value` in every round."""
    return Ratio(name, [value(results[slow]) / value(results[fast]) for results in rounds], target)


def machine(threads: int, packages: Sequence[str]) -> Result:
    """Where and with what it was measured: every published figure needs it."""
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "date": date.today().isoformat(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "python": platform.python_version(),
        **versions,
    }


def publish(lines: Sequence[Mapping[str, Any]], out: Path | None) -> None:
    """Prints results, one JSON object per line, and writes the same to a file where one is named."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    print(text, end="")
    if out is not None:
        out.write_text(text)


@contextmanager
def vllm_server(port: int, *options: str) -> Iterator[None]:
    """`observe-r1 serve` with the quick start and further options, as long as the context lasts."""
    command = [sys.executable, "-m", "observe_r1", "serve", "--config=quickstart.yaml", f"--serve.port={port}"]
    server = subprocess.Popen([*command, "--serve.max_model_len=512", *options], start_new_session=True)
    try:
        yield
    finally:
        os.killpg(server.pid, signal.SIGKILL)


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
