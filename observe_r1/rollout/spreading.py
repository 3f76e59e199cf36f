"""Spreads requests over servers that may fail."""

from __future__ import annotations

import asyncio
import warnings
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from observe_r1.rollout.vllm_client import RequestFailed, ServerDown, VLLMServer

Answer = dict[str, Any]


@dataclass(frozen=True)
class Patience:
    """How long and how often servers are tried.

    Args:
        request_seconds: For the completions of one prompt.
        recovery_seconds: For a server that fails to come back before it is given up.
        attempts: For one prompt, over all servers.
        health_every: Seconds from one sign of life to the next, while requests run.
    """

    request_seconds: float = 1800.0
    recovery_seconds: float = 60.0
    attempts: int = 4
    health_every: float = 10.0


@dataclass
class Spread:
    """One round of requests. Every server works on some of them, and takes a new one when one is done.

    Args:
        servers: In the order in which they get their first requests.
        requests: Bodies; each gets one answer.
        prepare: Makes sure that a healthy server may be used, or raises.
        per_server: Requests that one server works on at the same time.
        patience: With servers.
    """

    servers: Sequence[VLLMServer]
    requests: Sequence[Mapping[str, Any]]
    prepare: Callable[[VLLMServer], Awaitable[None]]
    per_server: int
    patience: Patience
    _answers: dict[int, Answer] = field(default_factory=dict)
    _waiting: asyncio.Queue[int] = field(default_factory=asyncio.Queue)
    _attempts: Counter[int] = field(default_factory=Counter)
    _lost: dict[str, str] = field(default_factory=dict)  # servers that were given up, and why

    async def run(self) -> list[Answer]:
        """The answers, in the order of the requests.

        Raises:
            RuntimeError: No server is left, or a request failed on every attempt.
        """
        for number in range(len(self.requests)):
            self._waiting.put_nowait(number)
        self._all_answered = asyncio.Event()
        users = [asyncio.create_task(self._use(server)) for server in self.servers]
        answered = asyncio.create_task(self._all_answered.wait())
        try:
            open_tasks: set[asyncio.Task[Any]] = {answered, *users}
            while not self._all_answered.is_set():
                ended, open_tasks = await asyncio.wait(open_tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in ended:
                    task.result()  # an error of a task ends the round
                if open_tasks == {answered}:
                    reasons = "; ".join(self._lost.values())
                    raise RuntimeError(
                        f"No vLLM server is left ({len(self._answers)} of {len(self.requests)} prompts were "
                        f"answered): {reasons}. Start them again (`observe-r1 serve`) and resume from the last "
                        "checkpoint: fit --ckpt_path last."
                    )
        finally:
            await _cancelled([answered, *users])
        return [self._answers[number] for number in range(len(self.requests))]

    async def _use(self, server: VLLMServer) -> None:
        """Has one server work until all is answered, through failures that it recovers from; ends when it is lost."""
        reason: str | None = None
        while await self._recovered(server, reason):
            watch = asyncio.create_task(self._watch(server))
            # the server that is ready first must not take more than its share
            share = -(-len(self.requests) // (len(self.servers) - len(self._lost)))
            lanes = [asyncio.create_task(self._work(server)) for _ in range(min(share, self.per_server))]
            tasks = [watch, *lanes]
            try:
                (ended, *_), _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                await _cancelled(tasks)
            try:
                ended.result()
            except ServerDown as error:
                reason = str(error)
                warnings.warn(f"{reason}: its prompts go to other servers, or wait for it.", stacklevel=2)

    async def _recovered(self, server: VLLMServer, reason: str | None) -> bool:
        """Waits, with growing pauses, until a server can be used; False when it takes too long."""
        loop = asyncio.get_running_loop()
        until, pause = loop.time() + self.patience.recovery_seconds, 0.25
        while True:
            if await server.is_healthy():
                try:
                    await self.prepare(server)
                    return True
                except (ServerDown, RequestFailed) as error:
                    reason = str(error)
            if loop.time() + pause > until:
                self._lost[server.url] = reason or f"{server.url} does not answer"
                return False
            await asyncio.sleep(pause)
            pause = min(2 * pause, 5.0)

    async def _work(self, server: VLLMServer) -> None:
        while True:
            number = await self._waiting.get()
            try:
                self._answers[number] = await server.generate(self.requests[number], self.patience.request_seconds)
            except (ServerDown, RequestFailed) as error:
                self._attempts[number] += 1
                if self._attempts[number] >= self.patience.attempts:
                    raise RuntimeError(f"A prompt failed {self.patience.attempts} times, at last: {error}") from error
                self._waiting.put_nowait(number)
                if isinstance(error, ServerDown):
                    raise
                await asyncio.sleep(0.25 * 2 ** self._attempts[number])
            except asyncio.CancelledError:
                self._waiting.put_nowait(number)
                raise
            if len(self._answers) == len(self.requests):
                self._all_answered.set()

    async def _watch(self, server: VLLMServer) -> None:
        """Ends when the server gives no sign of life: one that hangs keeps its connections open."""
        while True:
            seconds = self.patience.health_every
            await asyncio.sleep(seconds)
            if not await server.is_healthy(seconds) and not await server.is_healthy(3 * seconds):
                raise ServerDown(f"{server.url} shows no sign of life")


async def _cancelled(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
