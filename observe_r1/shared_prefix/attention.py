"""Attention over packed rows, behind the attention interface of transformers.

The row's layout travels as a keyword argument of the model's forward: a global could be gone when a checkpointed block
is computed again. Calls without it (generation, padded rows) are ordinary attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from observe_r1.shared_prefix.layout import RowLayout, VarlenIndex, segments
from observe_r1.shared_prefix.two_pass import two_pass_attention, two_pass_runs

NAME = "observe_r1_shared_prefix"
"""Under which transformers finds this attention."""


@dataclass
class PrefixAttention:
    """What the attention of every layer is told about the row. The index moves to the device once."""

    layout: RowLayout
    backend: str  # a name of `BACKENDS`
    _varlen: VarlenIndex | None = field(default=None, repr=False)

    def varlen(self, device: torch.device) -> VarlenIndex:
        if self._varlen is None:
            self._varlen = self.layout.varlen.to(device)
        return self._varlen


def sdpa_segments(query: Tensor, key: Tensor, value: Tensor, row: PrefixAttention, scale: float) -> Tensor:
    """Runs everywhere: one SDPA call per prompt and per completion, the prompt's keys joined to the completion's."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    outputs = []
    for own, prompt in segments(row.layout):
        if prompt is None:
            part = F.scaled_dot_product_attention(
                query[:, :, own], key[:, :, own], value[:, :, own], is_causal=True, scale=scale
            )
        else:
            length, before = own.stop - own.start, prompt.stop - prompt.start
            mask = torch.ones(length, before + length, dtype=torch.bool, device=query.device).tril(before)
            part = F.scaled_dot_product_attention(
                query[:, :, own],
                torch.cat((key[:, :, prompt], key[:, :, own]), dim=2),
                torch.cat((value[:, :, prompt], value[:, :, own]), dim=2),
                attn_mask=mask,
                scale=scale,
            )
        outputs.append(part)
    return torch.cat(outputs, dim=2)


def two_pass(query: Tensor, key: Tensor, value: Tensor, row: PrefixAttention, scale: float) -> Tensor:
    """CPU only: all completions of a group against their prompt in one pass, each against itself in another."""
    return two_pass_attention(query, key, value, row.layout, scale)


def varlen(query: Tensor, key: Tensor, value: Tensor, row: PrefixAttention, scale: float) -> Tensor:
    """CUDA in half precision: one call of `torch.nn.attention.varlen` over the row."""
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 takes grouped heads without being told
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
    causal = (-1, 0)  # aligned to the end of the keys
    return _one_call(partial(varlen_attn, window_size=causal, scale=scale, **grouped), query, key, value, row)


def flash_attn(query: Tensor, key: Tensor, value: Tensor, row: PrefixAttention, scale: float) -> Tensor:
    """CUDA in half precision, with the flash-attn package: the same call, its kernels."""
    from flash_attn import flash_attn_varlen_func

    # causal: since flash-attn 2.1 aligned to the end of the keys
    return _one_call(partial(flash_attn_varlen_func, softmax_scale=scale, causal=True), query, key, value, row)


def _one_call(kernel: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, row: PrefixAttention) -> Tensor:
    """A variable-length kernel over the whole row; all of them begin with the same seven arguments."""
    index = row.varlen(query.device)
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))  # [L, heads, D]
    key, value = (_Gather.apply(states, index.keys) for states in (key, value))  # type: ignore[no-untyped-call]
    output: Tensor = kernel(
        query.contiguous(),
        key,
        value,
        index.query_starts,
        index.key_starts,
        index.longest_query,
        index.longest_key,
    )
    return output.transpose(0, 1)[None]


class _Gather(torch.autograd.Function):
    """`states[index]` with a gradient that adds up in float32: half precision would round off the last of many."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = states.shape
        return states.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        wide = torch.promote_types(gradient.dtype, torch.float32)
        total = torch.zeros(ctx.shape, dtype=wide, device=gradient.device)
        return total.index_add_(0, index, gradient.to(wide)).to(gradient.dtype), None


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, PrefixAttention, float], Tensor]] = {
    "sdpa": sdpa_segments,
    "two_pass": two_pass,
    "varlen": varlen,
    "flash_attn": flash_attn,
}
"""Attention of a packed row: (query [1, H, L, D], key, value [1, H_kv, L, D], row, scale) -> [1, H, L, D]."""


def choose_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend to use: the configured one, or for `auto` the fastest where a row is computed.

    Raises:
        ValueError: The configured backend cannot run there.
    """
    half = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    runs = {
        "varlen": half and _has_flash_kernels(device),
        "flash_attn": half and find_spec("flash_attn") is not None,
        "two_pass": device.type == "cpu" and two_pass_runs(dtype),
        "sdpa": True,
    }
    if backend == "auto":
        return next(name for name in ("varlen", "two_pass", "sdpa") if runs[name])
    if not runs[backend]:
        needs = {
            "varlen": "CUDA, half precision and an Ampere GPU or newer",
            "flash_attn": "CUDA, half precision and its package (pip install 'observe-r1[flash-attn]')",
            "two_pass": "a CPU and torch's own operators for it",
        }
        usable = ", ".join(["auto", *(name for name, can in runs.items() if can)])
        raise ValueError(
            f"policy.prefix_attention is {backend}, which needs {needs[backend]}; this is {device} with {dtype}. "
            f"Choose one of {usable}."
        )
    return backend


def _has_flash_kernels(device: torch.device) -> bool:
    ampere = (8, 0)
    return torch.cuda.get_device_capability(device) >= ampere and torch.backends.cuda.is_flash_attention_available()


def prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    shared_prefix: PrefixAttention | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The function transformers calls in every layer: packed rows by their backend, anything else by SDPA."""
    if shared_prefix is None:
        options.pop("position_ids", None)
        output: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options
        )
        return output
    if dropout:
        raise ValueError("attention dropout")
    if options.get("sliding_window") is not None:
        raise ValueError("sliding-window attention")
    if query.shape[0] != 1 or query.shape[2] != shared_prefix.layout.length or key.shape[2] != query.shape[2]:
        raise ValueError("attention that does not see the whole row")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if torch.is_autocast_enabled(query.device.type):
        # rotary embeddings leave query and key in float32, and autocast does not know every backend's operators
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    packed = BACKENDS[shared_prefix.backend](query, key, value, shared_prefix, scale)
    return packed.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, prefix_attention)
# without its own mask function transformers drops the padding mask of ordinary batches
AttentionMaskInterface.register(NAME, sdpa_mask)
