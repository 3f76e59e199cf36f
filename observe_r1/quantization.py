"""Frozen weights in 4 bits below adapters: QLoRA (arXiv 2305.14314), by bitsandbytes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

Quantization = Literal["nf4", "fp4"]
KINDS: tuple[str, ...] = get_args(Quantization)
NOT_QUANTIZED = [".*visual", ".*lm_head"]  # patterns of module names: few weights, and many digits are worth it


def quantization_config(kind: Quantization, dtype: torch.dtype) -> Any:
    """What `from_pretrained` needs to quantise the linear layers of the text model while it loads them.

    Args:
        kind: `nf4` or `fp4`; the scales of blocks are quantised too.
        dtype: In which the weights are multiplied.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ValueError("policy.quantization needs bitsandbytes: pip install 'observe-r1[qlora]'.") from error
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=NOT_QUANTIZED,  # of 4 bits too, despite the name
    )


def compute_alike(model: Any) -> None:
    """Without gradient, bitsandbytes computes with bfloat16 on CPUs that can: a rollout would differ from the training.

    It also packs the weights for that, and they are no longer what they were.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def chosen_layers(model: nn.Module) -> Iterator[nn.Linear]:
    """The linear layers of a model, with or without adapters, that `quantization_config` has quantised."""
    for name, module in model.named_modules():
        left_out = "lora_" in name or any(re.search(pattern, name) for pattern in NOT_QUANTIZED)
        if isinstance(module, nn.Linear) and not left_out:
            yield module


def packed_bytes(weights: int) -> int:
    """Of so many weights: two in a byte, one byte of scale for 64, and a float32 for 256 such scales."""
    return weights // 2 + weights // 64 + 4 * weights // (64 * 256)


def kind_of(model: Any) -> str | None:
    """How the weights of a Hugging Face model are quantised; None where they are not."""
    config = getattr(model.config, "quantization_config", None)
    return None if config is None else str(config.bnb_4bit_quant_type)


def dequantized(weight: Tensor) -> Tensor:
    """The weight as it is multiplied with; others are what they are."""
    if not is_quantized(weight):
        return weight
    from bitsandbytes.functional import dequantize_4bit

    full: Tensor = dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[attr-defined]
    return full


def unpack_to(model: nn.Module, dtype: torch.dtype) -> None:
    """From now on `dequantized` gives weights in this dtype. `nn.Module.to` does not reach what they are packed in."""
    for weight in filter(is_quantized, model.parameters()):
        weight.quant_state.dtype = dtype  # type: ignore[attr-defined]


def is_quantized(weight: Tensor) -> bool:
    """It holds two numbers in a byte, and its shape says nothing."""
    return getattr(weight, "quant_state", None) is not None


def full_shape_and_dtype(weight: Tensor) -> tuple[torch.Size, torch.dtype]:
    """Of what `dequantized` gives, without making it."""
    state: Any = weight.quant_state if is_quantized(weight) else weight  # type: ignore[attr-defined]
    return torch.Size(state.shape), state.dtype
