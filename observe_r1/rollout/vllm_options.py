"""How vLLM is started: the same arguments for an engine in the training process and for a server."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, Literal

import torch

CPU_CACHE_GIB = 1.0  # of keys and values where nothing is said: vLLM would take a share of the machine's memory


@dataclass(frozen=True)
class VLLMOptions:
    """What a user may choose about vLLM.

    Args:
        gpu_memory_utilization: Share of the GPU's memory that vLLM takes: weights and cache.
        cache_gib: GiB for keys and values; null: what the share above leaves, and 1 GiB on a CPU.
        max_model_len: Most tokens of a prompt with its completion; null: as many as the model and the cache allow.
        dtype: In which vLLM computes; `auto` is what the policy computes in.
        enforce_eager: No CUDA graphs and no compilation; null: on a CPU only, where compiling takes minutes.
        images_per_prompt: Most images of one prompt.
        engine_arguments: Further arguments of vLLM, by name.
    """

    gpu_memory_utilization: float = 0.9
    cache_gib: float | None = None
    max_model_len: int | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    enforce_eager: bool | None = None
    images_per_prompt: int = 8
    engine_arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                f"gpu_memory_utilization of vLLM is {self.gpu_memory_utilization}, but it is a share: use (0, 1]."
            )
        for name, value in (("cache_gib", self.cache_gib), ("max_model_len", self.max_model_len)):
            if value is not None and value <= 0:
                raise ValueError(f"{name} of vLLM is {value}, but it must be positive: use null for the default.")
        if self.images_per_prompt < 0:
            raise ValueError(f"images_per_prompt of vLLM is {self.images_per_prompt}: use 0 or more.")

    def arguments(self, model: str, dtype: torch.dtype, on_gpu: bool, processor: Any) -> dict[str, Any]:
        """Arguments of `vllm.LLM`.

        Args:
            model: Directory or hub name.
            dtype: That the policy computes in.
            on_gpu: vLLM will run on one.
            processor: Of the prompts; its pixel limits become vLLM's.

        Raises:
            ValueError: `engine_arguments` names what is set here.
        """
        cache = self.cache_gib if self.cache_gib is not None or on_gpu else CPU_CACHE_GIB
        size = processor.image_processor.size
        arguments = {
            "model": model,
            "dtype": str(dtype).removeprefix("torch.") if self.dtype == "auto" else self.dtype,
            "max_model_len": self.max_model_len or -1,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "kv_cache_memory_bytes": None if cache is None else int(cache * 2**30),
            "enforce_eager": not on_gpu if self.enforce_eager is None else self.enforce_eager,
            "enable_prefix_caching": True,
            # a seeded request whose prompt is read in two steps ends in "CPU Generator does not use offset"
            "enable_chunked_prefill": on_gpu,
            "limit_mm_per_prompt": {"image": self.images_per_prompt, "video": 0},
            "mm_processor_kwargs": {"size": {"shortest_edge": size.shortest_edge, "longest_edge": size.longest_edge}},
            "logprobs_mode": "processed_logprobs",  # of the logits after mask and temperature
            "generation_config": "vllm",  # the sampling defaults of the checkpoint do not leak
        }
        taken = sorted(arguments.keys() & self.engine_arguments.keys())
        if taken:
            raise ValueError(f"engine_arguments of vLLM: {', '.join(taken)} cannot be given there: we set it.")
        return arguments | self.engine_arguments


def process_environment() -> dict[str, str]:
    """Environment variables for vLLM and the processes that it starts, beside those there are."""
    startup = str(files("observe_r1") / "child_process")  # holds a sitecustomize.py
    return {
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "VLLM_NO_USAGE_STATS": os.environ.get("VLLM_NO_USAGE_STATS", "1"),  # it reports to its makers otherwise
        "PYTHONPATH": os.pathsep.join(filter(None, [startup, os.environ.get("PYTHONPATH")])),
    }
