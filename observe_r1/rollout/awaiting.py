"""Waits for vLLM servers that are still starting, and says so."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from rich.console import Console

from observe_r1.rollout.vllm_client import VLLMServer

POLL_SECONDS = 1.0
LINE_SECONDS = 60.0  # from one line to the next in a log


async def await_servers(servers: Sequence[VLLMServer], seconds: float, console: Console) -> None:
    """Until all of them answer: one changing line on a terminal, elsewhere plain lines at long intervals.

    Raises:
        RuntimeError: One of them does not answer within `seconds`.
    """
    started, missing, next_line = time.monotonic(), list(servers), 0.0

    def say(text: str) -> None:
        if not console.is_terminal:
            console.print(text, highlight=False, markup=False, soft_wrap=True)

    with console.status("") as status:
        while True:
            health = await asyncio.gather(*(server.is_healthy() for server in missing))
            missing = [server for server, is_healthy in zip(missing, health, strict=True) if not is_healthy]
            waited, urls = time.monotonic() - started, ", ".join(server.url for server in missing)
            if not missing:
                break
            if waited > seconds:
                raise RuntimeError(
                    f"{urls} did not answer within {seconds:g} s (rollout.start_seconds). Start a vLLM server there, "
                    f"with the same configs: observe-r1 serve --config … --serve.port {urlsplit(missing[0].url).port}"
                )
            text = f"waiting for {len(missing)} of {len(servers)} vLLM servers: {urls}"
            status.update(text)
            if waited >= next_line:
                say(f"{text} ({waited:.0f} of {seconds:g} s)")
                next_line = waited + LINE_SECONDS
            await asyncio.sleep(POLL_SECONDS)
    if next_line:
        say(f"all {len(servers)} vLLM servers answer after {waited:.0f} s")
