"""Shared fixtures: the tiny policy, small real ladders, and settings of the test run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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


class Commands:
    """A shell in which `observe-r1` and `python` come from `command_server.py`."""

    def __init__(self, directory: Path) -> None:
        self.binaries = directory / "bin"
        self.binaries.mkdir()
        server = Path(__file__).with_name("command_server.py")
        for command in ("observe-r1", "python"):
            client = self.binaries / command
            client.write_text(f"#!{sys.executable} -S\n" + server.read_text())
            client.chmod(0o755)
        self.socket = directory / "socket"
        self.log = directory / "server.log"
        # what libraries read when they are imported is the server's: the hub cannot be reached
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
        with self.log.open("w") as log:
            command = [sys.executable, str(server), str(self.socket)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        while not self.socket.exists():
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)

    def __call__(self, directory: Path, script: str, **environment: str) -> tuple[int, str]:
        """Exit code and output of a bash script in the directory."""
        path = os.pathsep.join([str(self.binaries), str(Path(sys.executable).parent), os.environ["PATH"]])
        added = {"PATH": path, "OBSERVE_R1_DOCS_SOCKET": str(self.socket), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        shell = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=directory,
            env={**os.environ, **added, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = shell.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            os.killpg(shell.pid, signal.SIGKILL)  # the client too, and with it what the server runs for it
            raise
        return shell.returncode, output


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """Runs scripts that use `observe-r1` and `python` many times: `code, output = commands(directory, script)`."""
    commands = Commands(tmp_path_factory.mktemp("commands"))
    yield commands
    commands.process.kill()
    commands.process.wait()


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
        finished = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
        assert finished.returncode == 0, finished.stderr
        return json.loads(finished.stdout.splitlines()[-1])

    return open_page
