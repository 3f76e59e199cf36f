"""Spreading requests over servers that misbehave. They are real HTTP servers; tests/vllm does it with vLLM."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from observe_r1.rollout.spreading import Patience, Spread
from observe_r1.rollout.vllm_client import VLLMServer

Handler = Callable[[int], Awaitable[web.Response]]
PATIENCE = Patience(request_seconds=5.0, recovery_seconds=1.0, attempts=3, health_every=0.1)


class Site:
    """A server whose answer to each request a test decides; it echoes the request's number where it behaves."""

    def __init__(self, misbehaves: Handler | None = None, healthy: bool = True) -> None:
        self.misbehaves = misbehaves
        self.healthy = healthy
        self.served: list[int] = []
        self.running = self.most_running = 0

    async def start(self) -> str:
        app = web.Application()
        app.router.add_get("/health", self.health)
        app.router.add_post("/inference/v1/generate", self.generate)
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        port: int = self.runner.addresses[0][1]
        return f"http://127.0.0.1:{port}"

    async def health(self, _: web.Request) -> web.Response:
        if self.healthy is None:
            await asyncio.sleep(60)
        return web.Response(status=200 if self.healthy else 503)

    async def generate(self, request: web.Request) -> web.Response:
        number = (await request.json())["number"]
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            if self.misbehaves is not None and (answer := await self.misbehaves(number)) is not None:
                return answer
            await asyncio.sleep(0.005)
        finally:
            self.running -= 1
        self.served.append(number)
        return web.json_response({"number": number})


def spread(sites: list[Site], requests: int, per_server: int = 4, **patience: Any) -> list[int]:
    """The numbers that come back."""

    async def run() -> list[int]:
        urls = [await site.start() for site in sites]
        async with aiohttp.ClientSession() as session:
            servers = [VLLMServer(url, None, session) for url in urls]
            bodies = [{"number": number} for number in range(requests)]
            options = Patience(**{**vars(PATIENCE), **patience})
            try:
                answers = await Spread(servers, bodies, _ready, per_server, options).run()
            finally:
                for site in sites:
                    await site.runner.cleanup()
            return [answer["number"] for answer in answers]

    return asyncio.run(run())


async def _ready(server: VLLMServer) -> None:
    pass


@given(servers=st.integers(1, 3), requests=st.integers(1, 30), per_server=st.integers(1, 8))
def test_every_request_is_answered_once_in_order_and_all_servers_share(
    servers: int, requests: int, per_server: int
) -> None:
    sites = [Site() for _ in range(servers)]
    assert spread(sites, requests, per_server) == list(range(requests))
    assert sorted(number for site in sites for number in site.served) == list(range(requests))
    share = -(-requests // servers)
    assert all(site.most_running <= min(share, per_server) for site in sites)


def test_an_error_is_tried_again_elsewhere_or_later() -> None:
    seen: Counter[int] = Counter()

    async def fails_first(number: int) -> web.Response | None:
        seen[number] += 1
        return web.Response(status=500, text="not now") if seen[number] == 1 else None

    assert spread([Site(fails_first), Site()], 12) == list(range(12))


def test_attempts_are_bounded_and_the_last_answer_is_told() -> None:
    async def fails(number: int) -> web.Response | None:
        return web.Response(status=500, text="out of memory") if number == 3 else None

    with pytest.raises(RuntimeError, match=r"failed 3 times, at last: .* answered 500: out of memory"):
        spread([Site(fails), Site(fails)], 6)


def test_a_refusal_is_an_error_at_once() -> None:
    async def refuses(number: int) -> web.Response | None:
        return web.Response(status=400, text="prompt too long")

    with pytest.raises(ValueError, match="answered 400: prompt too long"):
        spread([Site(refuses)], 2)


def test_a_server_that_hangs_loses_its_requests_to_the_others() -> None:
    """Its connections stay open, and it gives no sign of life."""
    hanging = Site()

    async def hangs(number: int) -> web.Response | None:
        hanging.healthy = None  # type: ignore[assignment]
        await asyncio.sleep(60)
        return None

    hanging.misbehaves = hangs
    with pytest.warns(UserWarning, match="no sign of life"):
        assert spread([hanging, Site()], 8, request_seconds=60.0) == list(range(8))


def test_a_request_that_takes_too_long_is_given_to_another() -> None:
    async def slow(number: int) -> web.Response | None:
        await asyncio.sleep(60)
        return None

    with pytest.warns(UserWarning, match="has not answered within 0.2 s"):
        assert spread([Site(slow), Site()], 4, request_seconds=0.2, attempts=20) == list(range(4))


def test_without_a_server_the_reasons_are_told() -> None:
    with pytest.raises(RuntimeError, match=r"No vLLM server is left \(0 of 3 prompts .* does not answer"):
        spread([Site(healthy=False), Site(healthy=False)], 3, recovery_seconds=0.3)
