"""One vLLM server, over HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import aiohttp

CONTROL_TIMEOUT = 10.0  # seconds for an answer that takes no work
LOADING = "loading"  # as the version of a server whose weights are being replaced


class ServerDown(RuntimeError):
    """The server does not answer: it has ended, hangs, or cannot be reached."""


class RequestFailed(RuntimeError):
    """The server answered one request with an error that another attempt may not meet."""


class VLLMServer:
    """A server that `observe-r1 serve` started.

    Args:
        url: As `http://host:port`.
        key: That the server asks for, if it does.
        session: Of the event loop that is running.
    """

    def __init__(self, url: str, key: str | None, session: aiohttp.ClientSession) -> None:
        self.url = url
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._session = session

    async def is_healthy(self, timeout: float = CONTROL_TIMEOUT) -> bool:
        try:
            await self._request("GET", "/health", timeout)
        except (ServerDown, RequestFailed):
            return False
        return True

    async def version(self) -> str:
        """Of the weights it serves, as the trainer named them."""
        return str((await self._request("GET", "/weight_info"))["weight_version"])

    async def state(self) -> dict[str, Any]:
        """What `WeightReader.observe_r1_state` says."""
        answer = await self._request("POST", "/collective_rpc", json={"method": "observe_r1_state"})
        state: dict[str, Any] = answer["results"][0]
        return state

    async def workers(self) -> int:
        """Processes that hold a part of the model."""
        return int((await self._request("GET", "/get_world_size"))["world_size"])

    async def generate(self, body: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """Completions of one prompt, in vLLM's own form: token ids in, token ids out.

        Raises:
            RequestFailed: Also when it takes too long, which says nothing about the server.
        """
        try:
            answer: dict[str, Any] = await self._request("POST", "/inference/v1/generate", timeout, json=body)
        except ServerDown as error:
            if isinstance(error.__cause__, TimeoutError):
                raise RequestFailed(str(error)) from error
            raise
        return answer

    async def take_over(self, directory: str, version: str, timeout: float) -> None:
        """Replaces the weights by those of a directory. Requests wait meanwhile; one that was begun is finished first.

        Should anything break off on the way, the server is left paused and under the version `loading`.
        """
        await self.pause(timeout)
        load = {"method": "observe_r1_load", "kwargs": {"directory": directory}}
        await self._request("POST", "/collective_rpc", timeout, json=load)
        await self.resume(version)

    async def pause(self, timeout: float) -> None:
        """Lets requests wait, once those that run have ended, and disowns the version of the weights."""
        await self._request("POST", "/pause", timeout, params={"mode": "wait", "clear_cache": "false"})
        await self._name_version(LOADING)

    async def resume(self, version: str) -> None:
        """Drops what was computed with the weights before, and serves those that are there now."""
        # the first two hold what the old weights computed, or an index of it; the third holds pixels, whose index the
        # reload has emptied on one side
        answer = await self._request("POST", "/reset_prefix_cache")
        if not answer["success"]:
            raise RequestFailed(f"{self.url} could not empty its prefix cache, because requests were running.")
        await self._request("POST", "/reset_encoder_cache")
        await self._request("POST", "/reset_mm_cache")
        await self._name_version(version)
        await self._request("POST", "/resume")

    async def call(self, path: str, body: Mapping[str, Any], timeout: float) -> Any:
        """Posts to another of vLLM's paths."""
        return await self._request("POST", path, timeout, json=body)

    async def _name_version(self, version: str) -> None:
        await self._request("POST", "/update_weight_version", json={"new_version": version})

    async def _request(self, method: str, path: str, timeout: float = CONTROL_TIMEOUT, **arguments: Any) -> Any:
        limits = aiohttp.ClientTimeout(total=timeout, sock_connect=CONTROL_TIMEOUT)
        try:
            async with self._session.request(
                method, self.url + path, headers=self._headers, timeout=limits, **arguments
            ) as response:
                if response.status >= 500:
                    raise RequestFailed(f"{self.url}{path} answered {response.status}: {await _text(response)}")
                if response.status >= 400:
                    raise ValueError(
                        f"{self.url}{path} answered {response.status}: {await _text(response)} "
                        "(Did `observe-r1 serve` start this server, and is the key in OBSERVE_R1_SERVER_KEY its own?)"
                    )
                return await response.json() if response.content_type == "application/json" else None
        except TimeoutError as error:
            raise ServerDown(f"{self.url}{path} has not answered within {timeout:g} s") from error
        except aiohttp.ClientError as error:
            raise ServerDown(f"{self.url}{path}: {error or type(error).__name__}") from error


async def _text(response: aiohttp.ClientResponse) -> str:
    """The start of what a server says about an error."""
    return (await response.text())[:500]
