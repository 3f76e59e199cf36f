"""How the weights of the trainer get into vLLM servers."""

from __future__ import annotations

import asyncio
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from observe_r1.rollout.vllm_client import RequestFailed, ServerDown, VLLMServer
from observe_r1.rollout.weight_files import WeightFiles

Weights = Iterator[tuple[str, Tensor]]
REMEDY = "Start them again (`observe-r1 serve`) and resume from the last checkpoint: fit --ckpt_path last."


class WeightTransfer(ABC):
    """One way. Works on rank 0; the other ranks only take part in gathering the weights."""

    @abstractmethod
    async def send(self, weights: Weights, version: str, servers: Sequence[VLLMServer]) -> None:
        """Has all servers that answer serve `version`. A server that breaks off on the way serves nothing.

        Raises:
            RuntimeError: They answer, and none could take it over.
        """

    @abstractmethod
    async def bring_up_to_date(self, server: VLLMServer, version: str) -> None:
        """Has a server that was started again serve the version that the others serve already.

        Raises:
            ServerDown: It has to wait for the next `send`.
        """

    def close(self) -> None:  # noqa: B027 - one that holds nothing need not say so
        """Leaves nothing behind."""


class FileTransfer(WeightTransfer):
    """Through safetensors in a directory that trainer and servers share.

    Args:
        place: The directory; None: among the temporary files of this machine.
        timeout: Seconds for a server to finish its requests and read the weights.
    """

    def __init__(self, place: str | None, timeout: float) -> None:
        self._files = WeightFiles(place)
        self._timeout = timeout

    async def send(self, weights: Weights, version: str, servers: Sequence[VLLMServer]) -> None:
        directory = str(self._files.write(weights, version))
        taken = (server.take_over(directory, version, self._timeout) for server in servers)
        report(servers, await asyncio.gather(*taken, return_exceptions=True))
        self._files.keep_only_current()

    async def bring_up_to_date(self, server: VLLMServer, version: str) -> None:
        assert self._files.current is not None
        await server.take_over(str(self._files.current), version, self._timeout)

    def close(self) -> None:
        self._files.remove()


def report(servers: Sequence[VLLMServer], outcomes: Sequence[BaseException | None]) -> None:
    """Warns of servers that failed to take over weights: those that do not answer may come back.

    Raises:
        RuntimeError: All of them answered, and failed.
    """
    failures = {server.url: outcome for server, outcome in zip(servers, outcomes, strict=True) if outcome is not None}
    for error in failures.values():
        if not isinstance(error, ServerDown | RequestFailed):
            raise error
    if len(failures) == len(servers) and all(isinstance(error, RequestFailed) for error in failures.values()):
        reasons = "; ".join(str(error) for error in failures.values())
        raise RuntimeError(f"No vLLM server took over the new weights: {reasons}. {REMEDY}")
    for url, error in failures.items():
        warnings.warn(f"{url} did not take over the new weights, and waits until it has them: {error}", stacklevel=2)


class NCCLTransfer(WeightTransfer):
    """From GPU to GPU, with vLLM's own trainer engine. Nobody has run this yet: it needs two GPUs.

    The group is made anew whenever the set of servers has changed, so a server that was started again joins with the
    next transfer. vLLM's engines find each other through a store that exchanges pickled ids: for networks where nobody
    else can reach the trainer.

    Args:
        metadata: Name, dtype and shape of what every transfer sends, in its order.
        device: GPU of the trainer.
        is_here: All servers are on this machine.
        timeout: Seconds for a server to finish its requests and receive the weights.
    """

    def __init__(
        self,
        metadata: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
        device: torch.device,
        is_here: bool,
        timeout: float,
    ) -> None:
        self._metadata = metadata
        self._device = device
        self._is_here = is_here
        self._timeout = timeout
        self._engine: Any = None
        self._source: Any = None
        self._client: Any = None
        self._last = ""

    async def send(self, weights: Weights, version: str, servers: Sequence[VLLMServer]) -> None:
        health = await asyncio.gather(*(server.is_healthy() for server in servers))
        alive = [server for server, is_healthy in zip(servers, health, strict=True) if is_healthy]
        if not alive:
            report(servers, [ServerDown(f"{server.url} does not answer") for server in servers])
            return
        try:
            await self._send(weights, version, alive)
        except (ServerDown, RequestFailed) as error:
            raise RuntimeError(f"A transfer of weights by NCCL broke off: {error}. {REMEDY}") from error

    async def _send(self, weights: Weights, version: str, alive: list[VLLMServer]) -> None:
        held = {await server.version() for server in alive}
        await asyncio.gather(*(server.pause(self._timeout) for server in alive))
        if self._engine is None or held != {self._last} or len(alive) != len(self._client.servers):
            await self._connect(alive)
        self._client.servers = alive  # their sessions belong to the event loop that runs now
        self._client.loop = asyncio.get_running_loop()
        self._source.weights = weights
        # vLLM packs on CUDA streams of its own, which do not wait for the optimizer's last step
        await asyncio.to_thread(self._on_device, torch.cuda.synchronize)
        await asyncio.to_thread(self._on_device, self._engine.send_weights)
        await asyncio.gather(*(server.resume(version) for server in alive))
        self._last = version

    async def bring_up_to_date(self, server: VLLMServer, version: str) -> None:
        raise ServerDown(f"{server.url} was started again and gets weights with the next transfer by NCCL")

    def close(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None

    async def _connect(self, servers: Sequence[VLLMServer]) -> None:
        from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        from vllm.utils.network_utils import get_ip, get_open_port

        metadata = [ParamMeta(name, dtype, shape) for name, dtype, shape in self._metadata]

        class Source(WeightSource):  # type: ignore[misc]
            weights: Weights = iter(())

            def metadata(self) -> list[Any]:
                return metadata

            def __iter__(self) -> Weights:
                return self.weights

        self.close()
        # a server may still be in a group of this trainer, or of one before
        await asyncio.gather(*(s.call("/shutdown_weight_transfer_engine", {}, self._timeout) for s in servers))
        workers = [await server.workers() for server in servers]
        self._source = Source()
        self._client = ServerGroup(list(servers), workers, asyncio.get_running_loop(), self._timeout)
        info = NCCLTrainerInitInfo(
            rank=0,
            master_address="127.0.0.1" if self._is_here else get_ip(),
            master_port=get_open_port(),
            world_size=1 + sum(workers),
        )
        connect = partial(WeightTransferTrainerFactory.trainer_init, info, client=self._client, source=self._source)
        self._engine = await asyncio.to_thread(self._on_device, connect)

    def _on_device(self, act: Callable[[], Any]) -> Any:
        """Every thread has a current GPU of its own."""
        with torch.cuda.device(self._device):
            return act()


class ServerGroup:
    """vLLM's client of a weight transfer, speaking to several servers as if they were one.

    Its methods are called from threads of vLLM's engine and wait for the event loop.

    Args:
        servers: That take part.
        workers: Of each server: they follow each other in the group, behind the trainer, which has rank 0.
        loop: In which the servers' sessions live.
        timeout: Seconds for a step of the transfer.
    """

    def __init__(
        self, servers: list[VLLMServer], workers: list[int], loop: asyncio.AbstractEventLoop, timeout: float
    ) -> None:
        self.servers = servers
        self.workers = workers
        self.loop = loop
        self._timeout = timeout

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        offsets = [1 + sum(self.workers[:number]) for number in range(len(self.servers))]
        self._call("/init_weight_transfer_engine", [{"init_info": init_info | {"rank_offset": o}} for o in offsets])

    def start_weight_update(self) -> None:
        self._call("/start_weight_update", [{}] * len(self.servers))

    def update_weights(self, update_info: Any) -> None:
        self._call("/update_weights", [{"update_info": update_info}] * len(self.servers))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call("/finish_weight_update", [{}] * len(self.servers))

    def _call(self, path: str, bodies: Sequence[dict[str, Any]]) -> None:
        async def post() -> None:
            calls = (s.call(path, body, self._timeout) for s, body in zip(self.servers, bodies, strict=True))
            await asyncio.gather(*calls)

        asyncio.run_coroutine_threadsafe(post(), self.loop).result()
