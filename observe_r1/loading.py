"""Which model is trained, and how it is loaded: whole, without memory, or spread over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatch
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers.modeling_layers import GradientCheckpointingLayer

from observe_r1.autocast_weights import keep_cast
from observe_r1.encoding import PromptOptions
from observe_r1.hub import check_on_hub
from observe_r1.logprobs import is_a_product
from observe_r1.offloading import OffloadedWeights
from observe_r1.parameter_groups import fitting_patterns
from observe_r1.policy import Policy
from observe_r1.quantization import KINDS, Quantization, compute_alike, quantization_config
from observe_r1.sharding import shard_like


@dataclass(frozen=True)
class LoraOptions:
    """Low-rank adapters instead of full weights (extra `lora`); the reference model is then the base, adapters off.

    Args:
        rank: r.
        alpha: Scale; the update counts alpha / rank.
        target_modules: Names of linear layers that get one, or `all-linear`.
    """

    rank: int = 64
    alpha: int = 128
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"policy.lora.rank is {self.rank} and policy.lora.alpha {self.alpha}: use 1 or more.")


@dataclass(frozen=True)
class PolicyOptions:
    """Which model is trained, and which of its weights.

    Args:
        pretrained: Directory or hub name of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL model; `quickstart` is the tiny policy
            that comes with the package.
        attn_implementation: `sdpa`, `eager` or, where installed, `flash_attention_2`; of the vision tower, and of the
            text model too where the forward is `padded`.
        forward: `shared_prefix` computes each prompt and its images once for all completions of its group; `padded`
            repeats them for every completion, as other trainers do. The gradients are the same.
        prefix_attention: Kernels of the shared-prefix forward. `auto`: `varlen` on CUDA in half precision, `two_pass`
            on the CPU, `sdpa` elsewhere. `flash_attn` needs its package (extra `flash-attn`).
        freeze: Shell patterns of parameter names that are not trained, such as `*visual*`.
        gradient_checkpointing: Compute the activations of every block again in the backward instead of keeping them;
            `text` or `vision` in the blocks of that part only.
        lora: Train adapters only.
        quantization: Below adapters, `nf4` or `fp4` keeps the linear layers of the text model in 4 bits (extra
            `qlora`); the vision tower and the output layer stay as they are.
        logprob_chunk_tokens: Number of completion tokens that have logits at once.
    """

    pretrained: str
    attn_implementation: str = "sdpa"
    forward: Literal["shared_prefix", "padded"] = "shared_prefix"
    prefix_attention: Literal["auto", "sdpa", "two_pass", "varlen", "flash_attn"] = "auto"
    freeze: list[str] = field(default_factory=list)
    gradient_checkpointing: bool | Literal["text", "vision"] = True
    lora: LoraOptions | None = None
    quantization: Quantization | None = None
    logprob_chunk_tokens: int = 512

    def __post_init__(self) -> None:
        if self.quantization not in (None, *KINDS):
            raise ValueError(
                f"policy.quantization is {self.quantization!r}: use {' or '.join(KINDS)}, or null for none."
            )
        if self.quantization is not None and self.lora is None:
            raise ValueError(
                f"policy.quantization is {self.quantization}, and weights in 4 bits cannot be trained: set policy.lora "
                "(--config policy/qlora.yaml), or policy.quantization to null."
            )
        if self.gradient_checkpointing not in (True, False, "text", "vision"):
            raise ValueError(
                f"policy.gradient_checkpointing is {self.gradient_checkpointing!r}: use true, false, text or vision."
            )
        if self.logprob_chunk_tokens < 1:
            raise ValueError(f"policy.logprob_chunk_tokens is {self.logprob_chunk_tokens}: use 1 or more.")


def load_policy(options: PolicyOptions, dtype: torch.dtype = torch.float32, *, empty: bool = False) -> Policy:
    """Loads the model to be trained.

    Args:
        empty: Weights have shapes and no memory (torch's meta device).

    Raises:
        ValueError: The directory does not exist, a freeze pattern matches nothing, or adapters need an extra.
    """
    model = _load_model(options, dtype, empty)
    for pattern in options.freeze:
        matched = [parameter for name, parameter in model.named_parameters() if fnmatch(name, pattern)]
        if not matched:
            fitting = ", ".join(fitting_patterns(name for name, _ in model.named_parameters()))
            raise ValueError(f"policy.freeze: {pattern!r} matches no parameter. Patterns that do: {fitting}.")
        for parameter in matched:
            parameter.requires_grad_(False)
    if options.lora is not None:
        with torch.device("meta") if empty else nullcontext():
            model = _add_adapters(model, options.lora)
    if options.gradient_checkpointing:
        _checkpoint_blocks(model, options)
    return _policy(model.train(), options)


def _checkpoint_blocks(model: Any, options: PolicyOptions) -> None:
    base = model.get_base_model() if options.lora is not None else model
    towers = {"vision": getattr(base.model, "visual", None), "text": base.get_decoder()}
    chosen = base if options.gradient_checkpointing is True else towers[str(options.gradient_checkpointing)]
    if chosen is None:
        raise ValueError(f"policy.gradient_checkpointing is vision, and {type(base).__name__} has no vision tower.")
    chosen.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if options.lora is not None and chosen is not towers["vision"]:
        model.enable_input_require_grads()


def load_reference(
    options: PolicyOptions,
    dtype: torch.dtype = torch.float32,
    autocast_dtype: torch.dtype | None = None,
    *,
    empty: bool = False,
) -> Policy:
    """A frozen copy of the model the policy starts from, for the KL term.

    Args:
        autocast_dtype: Of the autocast that every call of it will be under; None: under none.
    """
    model = _load_model(options, dtype, empty)
    if autocast_dtype is not None:
        keep_cast(model, autocast_dtype)
    return _policy(model, options).requires_grad_(False).eval()


def offload(policy: Policy, device: torch.device, by_block: bool) -> Policy:
    """Keeps the weights of a frozen policy in the memory of the CPU; see `Policy.at_hand`."""
    blocks = blocks_of(policy) if by_block else []
    policy.offloaded = OffloadedWeights(policy, blocks, device)
    return policy


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """Blocks of the text model and the vision tower."""
    return [part for part in module.modules() if isinstance(part, GradientCheckpointingLayer)]


def vocabulary_layers(policy: Policy) -> list[nn.Module]:
    """Embedding and output layer, each as large as several blocks; none where both have one weight."""
    first, last = policy.transformer.get_input_embeddings(), policy.transformer.get_output_embeddings()
    apart = type(first) is nn.Embedding and is_a_product(last) and last.weight is not first.weight
    return [first, last] if apart else []


def load_processor(pretrained: str, options: PromptOptions) -> Any:
    """The model's own processor, with the pixel limits of the prompt options."""
    from transformers import AutoProcessor

    with _explained(pretrained):
        processor = AutoProcessor.from_pretrained(locate(pretrained))
    if not hasattr(processor, "image_processor"):
        raise ValueError(
            f"policy.pretrained: {pretrained!r} has no image processor: give a vision-language model with its own."
        )
    limits = {"shortest_edge": options.min_pixels, "longest_edge": options.max_pixels}  # areas, despite the names
    size = {name: getattr(processor.image_processor.size, name) if v is None else v for name, v in limits.items()}
    processor.image_processor.size = type(processor.image_processor.size)(**size)
    return processor


def _policy(model: Any, options: PolicyOptions) -> Policy:
    return Policy(
        model,
        _pad_token_id(model),
        options.logprob_chunk_tokens,
        options.forward == "shared_prefix",
        options.prefix_attention,
    )


def shard_policy(
    load: Callable[..., Policy],
    options: PolicyOptions,
    dtype: torch.dtype,
    mesh: DeviceMesh,
    compute_dtype: torch.dtype | None = None,
) -> Policy:
    """A policy or reference whose weights FSDP2 spreads over the ranks of a mesh; only rank 0 reads the files.

    Args:
        load: `load_policy` or `load_reference`.
        dtype: Of weights, gradients and optimizer.
        compute_dtype: Of the weights where they are gathered; None: the same.
    """
    full = load(options, dtype) if torch.distributed.get_rank() == 0 else None
    policy = load(options, dtype, empty=True)
    shard_like(policy, [*blocks_of(policy), *vocabulary_layers(policy)], full, mesh, compute_dtype, ("next_logits",))
    policy.in_lockstep = True
    return policy


def _load_model(options: PolicyOptions, dtype: torch.dtype, empty: bool = False) -> Any:
    from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

    if empty:
        path = locate(options.pretrained)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(
                AutoConfig.from_pretrained(path), dtype=dtype, attn_implementation=options.attn_implementation
            )
        model.generation_config = GenerationConfig.from_pretrained(path)
        return model
    quantized = options.quantization
    with _explained(options.pretrained):
        model = AutoModelForImageTextToText.from_pretrained(
            locate(options.pretrained),
            dtype=dtype,
            attn_implementation=options.attn_implementation,
            quantization_config=None if quantized is None else quantization_config(quantized, dtype),
        )
    compute_alike(model)
    return model


@contextmanager
def _explained(pretrained: str) -> Iterator[None]:
    """Names the option that the block's errors are about."""
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        if str(error).startswith("policy."):
            raise
        raise ValueError(f"policy.pretrained: {pretrained!r} cannot be loaded: {error}") from error


def locate(pretrained: str) -> str:
    """What `from_pretrained` takes for a configured name.

    Raises:
        ValueError: The name looks like a directory and there is none, or the hub does not have it or cannot be reached.
    """
    if pretrained == "quickstart":
        return str(files("observe_r1.quickstart") / "policy")
    looks_local = pretrained.startswith((".", "/", "~")) or pretrained.count("/") > 1
    if looks_local and not Path(pretrained).expanduser().is_dir():
        raise ValueError(
            f"policy.pretrained: no directory {pretrained!r}. Give a directory with config.json and safetensors, or "
            "a hub name such as Qwen/Qwen2.5-VL-3B-Instruct."
        )
    directory = Path(pretrained).expanduser()
    if not directory.is_dir():
        check_on_hub(pretrained)
        return pretrained
    if not (directory / "config.json").is_file():
        raise ValueError(f"policy.pretrained: {pretrained!r} has no config.json, so it holds no Hugging Face model.")
    return str(directory)


def _add_adapters(model: Any, options: LoraOptions) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("policy.lora needs peft: pip install 'observe-r1[lora]'.") from error
    targets = "all-linear" if options.target_modules == ["all-linear"] else options.target_modules
    config = LoraConfig(r=options.rank, lora_alpha=options.alpha, target_modules=targets)
    linear = {name for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    if targets != "all-linear":
        # peft passes over a name that fits nothing where another one fits
        unknown = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in linear)]
        if unknown:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear if not name[-1].isdigit()}))
            raise ValueError(
                f"policy.lora.target_modules: no linear layer is called {', '.join(unknown)}. Names: {known}; or "
                "[all-linear]."
            )
    return get_peft_model(model, config)


def _pad_token_id(model: Any) -> int:
    candidates = (model.generation_config.pad_token_id, model.config.get_text_config().pad_token_id)
    return next((token for token in candidates if token is not None), 0)
