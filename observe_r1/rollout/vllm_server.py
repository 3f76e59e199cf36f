"""Rollouts on vLLM servers: any number of them, for any number of training ranks."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import random
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from threading import Lock
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import aiohttp
from PIL import Image
from torch import Tensor

from observe_r1 import ranks
from observe_r1.experience import Completion, EncodedPrompt, Sampled
from observe_r1.policy import Policy
from observe_r1.rollout.awaiting import await_servers
from observe_r1.rollout.base import RolloutEngine, SamplingOptions
from observe_r1.rollout.spreading import Patience, Spread
from observe_r1.rollout.vllm_client import RequestFailed, ServerDown, VLLMServer
from observe_r1.rollout.vllm_requests import (
    TakenOver,
    as_group,
    check_lengths,
    check_prompt,
    check_sampling,
    read_completion,
    sampling_parameters,
    unexpanded_token_ids,
)
from observe_r1.rollout.weight_transfer import FileTransfer, NCCLTransfer, WeightTransfer

KEY_VARIABLE = "OBSERVE_R1_SERVER_KEY"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
Result = TypeVar("Result")


class VLLMServerRollout(RolloutEngine):
    """Samples on vLLM servers that `observe-r1 serve` started; needs the callback `VLLMWeightSync`.

    Prompts are spread over the servers. When a server fails, its prompts go to the others; it is used again when it is
    back, after it was given the weights it missed. Each answer names the weights it was sampled with, so that old or
    mixed ones are an error and never trained on. A server that asks for a key finds it in the environment variable
    OBSERVE_R1_SERVER_KEY of the trainer.

    Args:
        servers: Addresses, as http://host:port.
        async_steps: 0 samples each rollout from the newest weights. 1 samples the next rollout while this one is
            trained on: the weights are then those from before it, which the importance correction makes up for.
        transfer: How servers get new weights. `files`: safetensors in a directory they share with the trainer;
            `nccl`: from GPU to GPU, by vLLM's own transfer engine (vLLM has to be installed for the trainer too).
        weight_directory: Of `files`; null: among the temporary files, where trainer and servers are one machine.
        requests_per_server: Prompts of one rank that one server works on at the same time.
        start_seconds: Within which all servers have to answer before the first rollout.
        request_seconds: For the completions of one prompt, and for a transfer of weights. Keep it below the time-out of
            the ranks' process group (Lightning's default: 30 minutes), as the others wait meanwhile.
        recovery_seconds: For a server that fails in a rollout to come back.
        attempts: For one prompt, over all servers.
    """

    def __init__(
        self,
        servers: list[str],
        async_steps: Literal[0, 1] = 0,
        transfer: Literal["files", "nccl"] = "files",
        weight_directory: str | None = None,
        requests_per_server: int = 64,
        start_seconds: float = 600.0,
        request_seconds: float = 1200.0,
        recovery_seconds: float = 300.0,
        attempts: int = 4,
    ) -> None:
        self.urls = [url.rstrip("/") for url in servers]
        hosts = {_checked_host(url) for url in self.urls}
        self._is_here = hosts <= set(LOOPBACK)  # all servers are on this machine
        if not servers or len(set(self.urls)) < len(servers):
            raise ValueError(f"rollout.servers is {servers}: give at least one address, and each only once.")
        if async_steps not in (0, 1):
            raise ValueError(f"rollout.async_steps is {async_steps}: use 0 (on-policy) or 1 (one rollout ahead).")
        if requests_per_server < 1 or attempts < 1:
            raise ValueError(
                f"rollout.requests_per_server is {requests_per_server} and rollout.attempts {attempts}: use 1 or more."
            )
        if request_seconds <= 0 or recovery_seconds < 0 or start_seconds < 0:
            raise ValueError(
                f"rollout.request_seconds is {request_seconds:g}, rollout.recovery_seconds {recovery_seconds:g} and "
                f"rollout.start_seconds {start_seconds:g}: use 0 or more, and more than 0 for requests."
            )
        if transfer == "files" and weight_directory is None and not self._is_here:
            raise ValueError(
                f"rollout.servers has hosts beside this one ({', '.join(sorted(hosts))}): set "
                "rollout.weight_directory to a directory that all of them see under the same path, or "
                "rollout.transfer to nccl."
            )
        self.async_steps = async_steps
        self.transfer = transfer
        self.weight_directory = weight_directory
        self.requests_per_server = requests_per_server
        self.start_seconds = start_seconds
        self.patience = Patience(request_seconds, recovery_seconds, attempts)
        self.version: int | None = None  # of the weights on the servers; None: none, or a transfer broke off
        self._label = ""  # the same, as the servers know it
        self._policy: Policy | None = None
        self._processor: Any = None
        self._taken_over: TakenOver | None = None
        self._transfer: WeightTransfer | None = None  # on rank 0
        self._limit = 0  # tokens of a prompt with its completion
        self._run = 0  # number of this run, so that no label of an earlier one is taken for one of this
        self._background: ThreadPoolExecutor | None = None
        self._begun: Future[Sampled] | None = None  # the last rollout that was sampled ahead
        self._rounds: set[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = set()  # that run now, in any thread
        self._updating = Lock()  # of one server at a time

    # ---- start ------------------------------------------------------------------------------------------------------

    def setup(self, policy: Policy, processor: Any) -> None:
        """Waits for the servers and gives them the weights of the policy.

        Raises:
            RuntimeError: A server does not answer in time.
            ValueError: A server was started with settings that do not fit the trainer's.
        """
        self._policy, self._processor = policy, processor
        self._run = ranks.from_first_rank(random.SystemRandom().getrandbits(40), policy.device)
        states = self._on_all_ranks(lambda: self._with_servers(self._wait_for_all))
        for url, state in zip(self.urls, states, strict=True):
            _check_state(url, state, policy, processor)
        self._limit = min(state["max_model_len"] for state in states)
        self._transfer = self._on_all_ranks(lambda: self._new_transfer(policy) if ranks.rank() == 0 else None)
        self._background = ThreadPoolExecutor(1, "rollout-ahead")
        self.update_weights(policy.named_weights(), version=0)

    def _new_transfer(self, policy: Policy) -> WeightTransfer:
        timeout = self.patience.request_seconds
        if self.transfer == "files":
            return FileTransfer(self.weight_directory, timeout)
        if policy.device.type != "cuda":
            raise ValueError("rollout.transfer is nccl, which needs a GPU for the trainer: use files.")
        metadata = [(name, dtype, tuple(shape)) for name, (shape, dtype) in policy.weight_shapes().items()]
        return NCCLTransfer(metadata, policy.device, self._is_here, timeout)

    async def _wait_for_all(self, servers: list[VLLMServer]) -> list[dict[str, Any]]:
        from rich.console import Console

        console = Console(stderr=True, quiet=ranks.rank() > 0)  # every rank waits, one says so
        await await_servers(servers, self.start_seconds, console)
        return list(await asyncio.gather(*(server.state() for server in servers)))

    # ---- sampling ---------------------------------------------------------------------------------------------------

    def begin(self, prompts: Sequence[EncodedPrompt], sampling: SamplingOptions, seed: int) -> Future[Sampled]:
        if not self.async_steps:
            return super().begin(prompts, sampling, seed)
        assert self._background is not None, "setup comes first"
        self._check_weights()
        self._begun = self._background.submit(self.timed_generate, prompts, sampling, seed)
        return self._begun

    def generate(
        self, prompts: Sequence[EncodedPrompt], sampling: SamplingOptions, seed: int
    ) -> list[list[Completion]]:
        """See `RolloutEngine.generate`.

        Raises:
            ValueError: Top-p is below 1, the temperature is out of vLLM's range, or a prompt with its completion
                exceeds what the servers were started for.
            RuntimeError: No server is left, or one answered with other weights or another prompt than the trainer's.
        """
        if not self.async_steps:  # otherwise training goes on meanwhile
            self._check_weights()
        check_sampling(sampling)
        check_lengths(prompts, sampling, self._limit, "--serve.max_model_len (or the memory) of `observe-r1 serve`")
        if not prompts:
            return []
        bodies = [self._body(prompt, sampling, seed, number) for number, prompt in enumerate(prompts)]
        first = ranks.rank() % len(self.urls)  # ranks begin with different servers

        async def spread(servers: list[VLLMServer]) -> list[dict[str, Any]]:
            order = servers[first:] + servers[:first]
            spreading = Spread(
                order, bodies, self._ask, self._bring_up_to_date, self.requests_per_server, self.patience
            )
            return await spreading.run()

        answers = self._with_servers(spread)
        return [self._group(prompt, answer, sampling) for prompt, answer in zip(prompts, answers, strict=True)]

    def _check_weights(self) -> None:
        if self._policy is None:
            raise RuntimeError("VLLMServerRollout.setup has not been called: no server is known to be there.")
        if self.version is None or self._taken_over is None:
            raise RuntimeError("The last transfer of weights to the vLLM servers broke off: start them again.")
        self._taken_over.check()

    def _body(self, prompt: EncodedPrompt, sampling: SamplingOptions, seed: int, number: int) -> dict[str, Any]:
        assert self._policy is not None
        parameters = sampling_parameters(self._policy, sampling, seed, number)
        images = prompt.prompt.images if prompt.vision is not None else ()
        return {
            "token_ids": unexpanded_token_ids(prompt).tolist(),
            "content_parts": [{"type": "image_url", "url": _data_url(image)} for image in images],
            "sampling_params": parameters,
            "return_token_ids": True,
        }

    async def _ask(self, server: VLLMServer, body: Mapping[str, Any]) -> dict[str, Any]:
        """One answer, all of it with the weights of the trainer."""
        answer = await server.generate(body, self.patience.request_seconds)
        ends = {choice["finish_reason"] for choice in answer["choices"]}
        if not ends <= {"stop", "length"}:  # one that was broken off may have no version
            raise RequestFailed(f"{server.url} ended a completion by {sorted(ends)}")
        versions = {span["version"] for choice in answer["choices"] for span in choice["weight_versions"]}
        if versions != {self._label}:
            raise ServerDown(
                f"{server.url} sampled with weights {sorted(versions)}, and the trainer's are {self._label} (was it "
                "started again, or does another training use it?)"
            )
        return answer

    def _group(self, prompt: EncodedPrompt, answer: dict[str, Any], sampling: SamplingOptions) -> list[Completion]:
        remedy = "the servers were started with the same prompt.min_pixels and prompt.max_pixels"
        check_prompt(prompt, answer["prompt_token_ids"], remedy)
        completions = []
        for choice in sorted(answer["choices"], key=lambda choice: choice["index"]):
            logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
            completions.append(read_completion(self._processor, choice["token_ids"], logprobs, choice["finish_reason"]))
        return as_group(completions, sampling)

    # ---- weights ----------------------------------------------------------------------------------------------------

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Gives all servers that answer the weights. Called on every rank: gathering sharded weights takes all of them.

        Raises:
            RuntimeError: No server could take them over.
        """
        assert self._policy is not None, "setup comes first"
        if self._begun is not None:
            wait([self._begun])
        ranks.agree(None, self._policy.device)  # the other ranks have their completions too
        transfer, self.version, rest = self._transfer, None, iter(weights)
        self._label = f"{self._run:x}-{version}"

        def send() -> None:
            if transfer is not None:
                self._with_servers(lambda servers: transfer.send(rest, self._label, servers))

        self._on_all_ranks(send, rest)
        self._taken_over = TakenOver(self._policy)
        self.version = version

    async def _bring_up_to_date(self, server: VLLMServer) -> None:
        """A server that was started again has the weights of its directory. Rank 0 gives it the newest."""
        if await server.version() == self._label:
            return
        if self._transfer is None:
            raise ServerDown(f"{server.url} has yet to get the newest weights, from rank 0")
        while not self._updating.acquire(blocking=False):  # another thread samples too
            await asyncio.sleep(0.1)
        try:
            if await server.version() != self._label:
                await self._transfer.bring_up_to_date(server, self._label)
        finally:
            self._updating.release()

    def close(self) -> None:
        self._policy = None  # no round begins any more
        for loop, task in list(self._rounds):
            with suppress(RuntimeError):  # it has ended meanwhile, and its loop with it
                loop.call_soon_threadsafe(task.cancel)  # with the connections; a server then drops what it works on
        if self._background is not None:
            self._background.shutdown(cancel_futures=True)
        if self._transfer is not None:
            self._transfer.close()
        self._transfer = self._background = self.version = None

    # ---- parts ------------------------------------------------------------------------------------------------------

    def _with_servers(self, use: Callable[[list[VLLMServer]], Awaitable[Result]]) -> Result:
        """Runs in this thread until it is done, or until `close` is called in another one."""

        async def run() -> Result:
            task = asyncio.current_task()
            assert task is not None
            this = (asyncio.get_running_loop(), task)
            self._rounds.add(this)
            # servers close idle connections after 5 s, and a request on one of those would look like a failure
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0)
            try:
                if self._policy is None:
                    raise RuntimeError("The rollout engine has been closed.")
                async with aiohttp.ClientSession(connector=connector) as session:
                    return await use([VLLMServer(url, os.environ.get(KEY_VARIABLE), session) for url in self.urls])
            finally:
                self._rounds.discard(this)

        return asyncio.run(run())

    def _on_all_ranks(self, act: Callable[[], Result], gathering: Iterable[Any] = ()) -> Result:
        """Acts; raises on all ranks if one of them fails. `gathering` takes all ranks to its end, whatever happens."""
        assert self._policy is not None
        error: Exception | None = None
        try:
            result = act()
        except Exception as caught:
            error = caught
        for _ in gathering:
            pass
        ranks.agree(error, self._policy.device)
        return result


def _checked_host(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"rollout.servers: {url!r} is no address of a server: use http://host:port.")
    return parts.hostname


def _check_state(url: str, state: dict[str, Any], policy: Policy, processor: Any) -> None:
    """Compares what a server was started with."""
    size = processor.image_processor.size
    expected = {
        "model_type": policy.transformer.config.model_type,
        "logprobs_mode": "processed_logprobs",
        "image_size": {"shortest_edge": size.shortest_edge, "longest_edge": size.longest_edge},
    }
    for name, value in expected.items():
        if state[name] != value:
            raise ValueError(
                f"{url} was started with {name} {state[name]!r}, and this training has {value!r}: start it with the "
                "same configs (`observe-r1 serve --config …`)."
            )


def _data_url(image: Image.Image) -> str:
    """Without loss: the server must see the pixels that the trainer sees."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
