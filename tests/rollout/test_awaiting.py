"""Waiting for servers that are still starting. They are real HTTP servers; tests/vllm waits for vLLM."""

from __future__ import annotations

import asyncio
import io
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from rich.console import Console

from observe_r1.rollout import awaiting
from observe_r1.rollout.vllm_client import VLLMServer


def awaited(polls: list[int], console: Console, seconds: float = 600.0) -> list[str]:
    """Waits for servers that are healthy after so many polls; their addresses."""

    async def run() -> list[str]:
        app = web.Application()
        asked = [0] * len(polls)

        async def health(request: web.Request) -> web.Response:
            number = int(request.match_info["server"])
            asked[number] += 1
            return web.Response(status=200 if asked[number] > polls[number] else 503)

        app.router.add_get("/{server}/health", health)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        urls = [f"http://127.0.0.1:{runner.addresses[0][1]}/{number}" for number in range(len(polls))]
        try:
            async with aiohttp.ClientSession() as session:
                await awaiting.await_servers([VLLMServer(url, None, session) for url in urls], seconds, console)
        finally:
            await runner.cleanup()
        return urls

    return asyncio.run(run())


@pytest.mark.parametrize(("every", "expected"), [(0.0, [2, 2, 1]), (3600.0, [2])])
def test_a_log_names_the_awaited_servers_at_intervals(monkeypatch: Any, every: float, expected: list[int]) -> None:
    monkeypatch.setattr(awaiting, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(awaiting, "LINE_SECONDS", every)
    log = io.StringIO()
    urls = awaited([0, 2, 3], Console(file=log, width=40))
    *waiting, last = log.getvalue().splitlines()
    assert [sum(url in line for url in urls) for line in waiting] == expected
    assert all(line.startswith(f"waiting for {n} of 3 vLLM servers") for n, line in zip(expected, waiting, strict=True))
    assert last.startswith("all 3 vLLM servers answer after")


def test_where_all_answer_at_once_nothing_is_said() -> None:
    log = io.StringIO()
    awaited([0, 0], Console(file=log))
    assert log.getvalue() == ""


def test_servers_that_do_not_come_are_named_with_the_command(monkeypatch: Any) -> None:
    monkeypatch.setattr(awaiting, "POLL_SECONDS", 0.01)
    with pytest.raises(RuntimeError, match=r"/1 did not answer within 0\.05 s .* --serve\.port \d+"):
        awaited([0, 10**9], Console(file=io.StringIO()), seconds=0.05)
