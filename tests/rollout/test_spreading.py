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
# a machine that stands still for seconds must not look like a server that does
PATIENCE = Patience(request_seconds=120.0, recovery_seconds=120.0, attempts=3)


class Site:
    """A server whose answer to each request a test decides; it echoes the request's number where it behaves."""

    def __init__(self, misbehaves: Handler | None = None, healthy: bool = True) -> None:
        self.misbehaves = misbehaves
        self.healthy = healthy
        self.health_status: int | None = None  # instead
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
            await asyncio.sleep(600)
        return web.Response(status=self.health_status or (200 if self.healthy else 503))

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

            async def ask(server: VLLMServer, body: Any) -> dict[str, Any]:
                return await server.generate(body, options.request_seconds)

            try:
                answers = await Spread(servers, bodies, ask, _ready, per_server, options).run()
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
        await asyncio.sleep(600)
        return None

    hanging.misbehaves = hangs
    quick = {"health_every": 0.1, "silence_seconds": 0.3, "attempts": 100}  # should the other one look like it too
    with pytest.warns(UserWarning, match="no sign of life"):
        assert spread([hanging, Site()], 8, **quick) == list(range(8))


def test_a_request_that_takes_too_long_is_tried_again_and_the_others_go_on() -> None:
    late: Counter[int] = Counter()

    async def slow_once(number: int) -> web.Response | None:
        late[number] += 1
        if number == 2 and late[number] == 1:
            await asyncio.sleep(600)
        return None

    site = Site(slow_once)
    assert spread([site], 6, request_seconds=1.0, attempts=100) == list(range(6))
    assert late[2] > 1
    assert site.served[0] != 2


@pytest.mark.filterwarnings("ignore:.*go to other servers")
def test_a_prompt_that_fails_while_its_server_dies_is_not_lost() -> None:
    """On its last attempt: the round ends with an error and does not wait for an answer that never comes."""

    async def dies(number: int) -> web.Response | None:
        await asyncio.sleep(0.05)
        raise asyncio.CancelledError  # closes the connection without an answer

    with pytest.raises(RuntimeError, match=r"failed 2 times|No vLLM server is left"):
        spread([Site(dies)], 8, per_server=8, attempts=2)


def test_the_servers_that_are_left_take_more() -> None:
    """More than their share: none of its requests is answered before."""

    async def waits(number: int) -> web.Response | None:
        while site.most_running <= 6:
            await asyncio.sleep(0.01)
        return None

    site = Site(waits)
    assert spread([Site(healthy=False), site], 12, per_server=12) == list(range(12))


@pytest.mark.filterwarnings("ignore:.*go to other servers")
def test_something_else_at_the_address_of_a_server_is_an_error_at_once() -> None:
    """It has been started there since, and knows none of our paths."""
    site = Site()

    async def is_replaced(number: int) -> web.Response | None:
        site.health_status = 404
        return web.Response(status=500)

    site.misbehaves = is_replaced
    with pytest.raises(ValueError, match=r"/health answered 404.*Did `observe-r1 serve` start this server"):
        spread([site], 2)


def test_without_a_server_the_reasons_are_told() -> None:
    with pytest.raises(RuntimeError, match=r"No vLLM server is left \(0 of 3 prompts .* does not answer"):
        spread([Site(healthy=False), Site(healthy=False)], 3, recovery_seconds=0.3)
