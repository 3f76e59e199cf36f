"""Shared fixtures: the tiny policy, small real ladders, and settings of the test run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from observe_r1.ladder.shards import write_ladder
from observe_r1.quickstart.questions import make_question

# timings of a shared machine say nothing about the code
settings.register_profile("shared_machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared_machine")


@pytest.fixture(scope="session")
def tiny_ladder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 questions of the quick start in 3 shards, difficulties declared: enough for order, resume and skips."""
    directory = tmp_path_factory.mktemp("ladders") / "tiny"
    prompts = [make_question("train", seed=5, index=index).prompt() for index in range(24)]
    write_ladder(prompts, directory, samples_per_shard=8)
    return directory


@pytest.fixture(scope="session")
def held_out_ladder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 held-out questions."""
    directory = tmp_path_factory.mktemp("ladders") / "held_out"
    write_ladder([make_question("held_out", seed=5, index=index).prompt() for index in range(12)], directory)
    return directory


class CommandLine:
    """Runs `observe-r1` in a process of its own, as a user does."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __call__(self, *arguments: object, expect: int | None = 0, timeout: int = 400) -> str:
        """Output of the command, which has to exit with `expect`."""
        finished = subprocess.run(
            [sys.executable, "-m", "observe_r1", *map(str, arguments)],
            cwd=self.directory,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONPATH": ""},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        output = finished.stdout + finished.stderr
        assert expect is None or finished.returncode == expect, output[-6000:]
        return output


@pytest.fixture(scope="session")
def command_line() -> type[CommandLine]:
    """Give it the directory to run in."""
    return CommandLine


@pytest.fixture(scope="session")
def browser() -> Callable[..., Any]:
    """Opens a page in a real browser: `browser(page, "light" or "dark", *widths)` gives what was found there."""
    pytest.importorskip(
        "PySide6.QtWebEngineCore", reason="PySide6-WebEngine, part of the extra dev", exc_type=ImportError
    )
    script = Path(__file__).parent / "run_report" / "browser.py"

    def open_page(page: Path, scheme: str, *widths: int) -> Any:
        command = [sys.executable, str(script), str(page), scheme, *map(str, widths)]
        finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert finished.returncode == 0, finished.stderr
        return json.loads(finished.stdout.splitlines()[-1])

    return open_page
