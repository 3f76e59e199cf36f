"""vLLM servers as users start them, by `observe-r1 serve`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import requests

from ..ports import free_port

KEY = "a secret of the tests"


class Server:
    """One server, in a process group of its own."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = directory / f"server-{self.port}.log"
        self.arguments = arguments
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "observe_r1", "serve", "--config=quickstart.yaml"]
        options = [f"--serve.port={self.port}", "--serve.cache_gib=0.25", "--serve.max_model_len=1024"]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*command, *options, *self.arguments],
                cwd=self.log.parent,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "OBSERVE_R1_SERVER_KEY": KEY},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self, seconds: float = 900) -> Server:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                requests.get(f"{self.url}/health", timeout=10).raise_for_status()
                return self
            except requests.RequestException:
                time.sleep(0.2)
        raise AssertionError(f"no server after {seconds} s: {self.log.read_text()[-3000:]}")

    def kill(self) -> None:
        """Without warning, with all of its processes."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def post(self, path: str, key: str = KEY, timeout: float = 120, **arguments: object) -> requests.Response:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return requests.post(self.url + path, headers=headers, timeout=timeout, **arguments)  # type: ignore[arg-type]

    def process_ids(self) -> set[int]:
        """Of the server and of all that it started."""
        parents = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                except (OSError, IndexError):
                    continue
        found = {self.process.pid}
        while more := {child for child, parent in parents.items() if parent in found} - found:
            found |= more
        return found

    def listening_addresses(self) -> set[str]:
        """Addresses at which any of its processes accepts TCP connections."""
        sockets = set()
        for process in self.process_ids():
            for descriptor in Path(f"/proc/{process}/fd").iterdir():
                try:
                    sockets.add(os.readlink(descriptor))
                except OSError:
                    continue
        addresses = set()
        for table, width in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                    words = bytes.fromhex(fields[1].partition(":")[0])
                    packed = b"".join(words[start : start + 4][::-1] for start in range(0, len(words), 4))
                    addresses.add(socket.inet_ntop(width, packed))
        return addresses
