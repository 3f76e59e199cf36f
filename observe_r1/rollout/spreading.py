"""Spreads requests over servers that may fail."""

from __future__ import annotations

import asyncio
import warnings
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from observe_r1.rollout.vllm_client import RequestFailed, ServerDown, VLLMServer

Request = Mapping[str, Any]
Answer = dict[str, Any]
LONGEST_PAUSE = 5.0  # seconds between two attempts


@dataclass(frozen=True)
class Patience:
    """How long and how often servers are tried.

    Args:
        request_seconds: For the completions of one prompt.
        recovery_seconds: For a server that fails to come back before it is given up.
        attempts: For one prompt, over all servers, and for one server in one round.
        health_every: Seconds from one sign of life to the next, while requests run.
        silence_seconds: Without a sign of life after which a server counts as gone; long answers keep it busy.
    """

    request_seconds: float = 1200.0
    recovery_seconds: float = 300.0
    attempts: int = 4
    health_every: float = 10.0
    silence_seconds: float = 120.0


@dataclass
class Spread:
    """One round of requests. Every server works on some of them, and takes a new one when one is done.

    Args:
        servers: In the order in which they get their first requests.
        requests: Bodies; each gets one answer.
        ask: Has a server answer a request, or raises.
        prepare: Makes sure that a healthy server may be used, or raises.
        per_server: Requests that one server works on at the same time.
        patience: With servers.
    """

    servers: Sequence[VLLMServer]
    requests: Sequence[Request]
    ask: Callable[[VLLMServer, Request], Awaitable[Answer]]
    prepare: Callable[[VLLMServer], Awaitable[None]]
    per_server: int
    patience: Patience
    _answers: dict[int, Answer] = field(default_factory=dict)
    _waiting: asyncio.Queue[int] = field(default_factory=asyncio.Queue)
    _attempts: Counter[int] = field(default_factory=Counter)
    _busy: Counter[str] = field(default_factory=Counter)  # requests on their way, by server
    _heard_of: dict[str, float] = field(default_factory=dict)  # when a server answered last
    _away: set[str] = field(default_factory=set)  # servers that cannot be used now
    _lost: dict[str, str] = field(default_factory=dict)  # servers that were given up, and why
    _ended: asyncio.Event = field(default_factory=asyncio.Event)
    _error: Exception | None = None  # that ends the round

    async def run(self) -> list[Answer]:
        """The answers, in the order of the requests.

        Raises:
            RuntimeError: No server is left, or a request failed on every attempt.
            ValueError: A server refused a request.
        """
        for number in range(len(self.requests)):
            self._waiting.put_nowait(number)
        users = [asyncio.create_task(self._use(server)) for server in self.servers]
        try:
            await self._ended.wait()
        finally:
            await _cancelled(users)
        if self._error is not None:
            raise self._error
        return [self._answers[number] for number in range(len(self.requests))]

    async def _use(self, server: VLLMServer) -> None:
        """Has one server work until the round ends, through failures that it recovers from."""
        reason: str | None = None
        for _ in range(self.patience.attempts):
            reason = await self._unusable(server, reason)
            if reason is not None:
                break
            self._away.discard(server.url)
            reason = await self._work_until_failure(server)
            self._away.add(server.url)
            warnings.warn(f"{reason}: its prompts go to other servers, or wait for it.", stacklevel=2)
        assert reason is not None
        self._lost[server.url] = reason
        if len(self._lost) == len(self.servers):
            self._end(
                RuntimeError(
                    f"No vLLM server is left ({len(self._answers)} of {len(self.requests)} prompts were answered): "
                    f"{'; '.join(self._lost.values())}. Start them again (`observe-r1 serve`) and resume from the last "
                    "checkpoint: fit --ckpt_path last."
                )
            )

    async def _unusable(self, server: VLLMServer, reason: str | None) -> str | None:
        """Waits, with growing pauses, until a server can be used; why not, when it takes too long."""
        loop = asyncio.get_running_loop()
        until, pause = loop.time() + self.patience.recovery_seconds, 0.25
        while True:
            try:
                if await server.is_healthy():
                    await self.prepare(server)
                    return None
            except (ServerDown, RequestFailed) as error:
                reason = str(error)
            except Exception as error:
                self._end(error)
                raise
            self._away.add(server.url)
            if loop.time() + pause > until:
                return reason or f"{server.url} does not answer"
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _work_until_failure(self, server: VLLMServer) -> str:
        """Why the server stopped to work."""
        tasks = [asyncio.create_task(self._watch(server))]
        tasks += [asyncio.create_task(self._work(server)) for _ in range(min(self.per_server, len(self.requests)))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _cancelled(tasks)
        return next(str(task.exception()) for task in tasks if not task.cancelled())

    async def _work(self, server: VLLMServer) -> None:
        """Answers one request after the other; ends when the server fails."""
        while True:
            # the server that is ready first must not take more than its share
            while self._busy[server.url] >= -(-len(self.requests) // (len(self.servers) - len(self._away) or 1)):
                await asyncio.sleep(0.05)
            self._busy[server.url] += 1
            try:
                await self._answer_next(server)
            finally:
                self._busy[server.url] -= 1

    async def _answer_next(self, server: VLLMServer) -> None:
        number = await self._waiting.get()
        try:
            self._answers[number] = await self.ask(server, self.requests[number])
        except (ServerDown, RequestFailed) as error:
            self._attempts[number] += 1
            if self._attempts[number] >= self.patience.attempts:
                self._end(RuntimeError(f"A prompt failed {self.patience.attempts} times, at last: {error}"))
            self._waiting.put_nowait(number)
            if isinstance(error, ServerDown):
                raise
            if not await server.is_healthy():  # its engine is dead, and it would refuse one prompt after the other
                raise ServerDown(str(error)) from error
            await asyncio.sleep(min(0.25 * 2 ** self._attempts[number], LONGEST_PAUSE))
        except asyncio.CancelledError:
            self._waiting.put_nowait(number)
            raise
        except Exception as error:
            self._end(error)
            raise
        else:
            self._heard_of[server.url] = asyncio.get_running_loop().time()
            if len(self._answers) == len(self.requests):
                self._end(None)

    async def _watch(self, server: VLLMServer) -> None:
        """Ends when the server gives no sign of life: one that hangs keeps its connections open."""
        loop, seconds = asyncio.get_running_loop(), self.patience.health_every
        while True:
            await asyncio.sleep(seconds)
            if loop.time() - self._heard_of.get(server.url, 0.0) < seconds or await server.is_healthy(seconds):
                continue
            if not await server.is_healthy(self.patience.silence_seconds):
                raise ServerDown(f"{server.url} shows no sign of life")

    def _end(self, error: Exception | None) -> None:
        """Ends the round; the first reason counts."""
        if not self._ended.is_set():
            self._error = error
            self._ended.set()


async def _cancelled(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
