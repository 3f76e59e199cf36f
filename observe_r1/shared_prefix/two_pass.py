"""Shared-prefix attention on the CPU: one pass over the prompt for all completions, merged by log-sum-exp.

The completions of a group attend to their prompt without a mask, as one block of queries, and causally to themselves.
The two results are joined as in https://arxiv.org/abs/2205.14135, section 3: each weighted by its share of the
normaliser. It needs attention that returns the normaliser, which torch has for the CPU as private operators only, so
`two_pass_runs` asks before anyone relies on it. 9 to 13 % faster than joining keys, without the copies.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from observe_r1.shared_prefix.layout import GroupSpan, RowLayout

Pass = tuple[slice, slice, bool]  # queries, keys, causal


def two_pass_attention(query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, scale: float) -> Tensor:
    """Attention [1, H, L, D] of a packed row. Keys and values may have fewer heads, each for several query heads."""
    output: Tensor = _TwoPass.apply(query, key, value, layout, scale)  # type: ignore[no-untyped-call]
    return output


@cache
def two_pass_runs(dtype: torch.dtype) -> bool:
    """Whether this torch has the operators, forward and backward, and they give what SDPA gives."""
    states = torch.linspace(-1, 1, 3 * 2 * 4 * 8, dtype=torch.float64).sin().view(3, 1, 2, 4, 8).to(dtype)
    query, key, value = states
    try:
        output, normaliser = _forward(query, key, value, True, 0.3)
        gradients = _backward(output, query, key, value, output, normaliser, True, 0.3)
    except (RuntimeError, AttributeError, TypeError):
        return False
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3)
    return torch.allclose(output, expected, atol=1e-2) and all(part.isfinite().all() for part in gradients)


class _TwoPass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, scale: float) -> Tensor:
        shared_key, shared_value = key, value
        key, value = _for_every_head(key, query), _for_every_head(value, query)
        output = torch.empty_like(query)
        normaliser = torch.empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
        for group in layout.groups:
            for queries, keys, causal in _own_passes(group):
                output[:, :, queries], normaliser[:, :, queries] = _forward(
                    query[:, :, queries], key[:, :, keys], value[:, :, keys], causal, scale
                )
            for queries, keys, causal in _prompt_pass(group):
                part, of_part = _forward(query[:, :, queries], key[:, :, keys], value[:, :, keys], causal, scale)
                own = normaliser[:, :, queries]
                joint = torch.logaddexp(own, of_part)
                share_of_own = (own - joint).exp_().to(output.dtype)[..., None]
                output[:, :, queries] = torch.lerp(part, output[:, :, queries], share_of_own)
                normaliser[:, :, queries] = joint
        ctx.save_for_backward(query, shared_key, shared_value, output, normaliser)
        ctx.layout, ctx.scale = layout, scale
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, shared_key, shared_value, output, normaliser = ctx.saved_tensors
        key, value = _for_every_head(shared_key, query), _for_every_head(shared_value, query)
        of_query, of_key, of_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)

        def one_pass(queries: slice, keys: slice, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
            # with the joint output and normaliser, each pass gives its share of the joint gradient
            return _backward(
                gradient[:, :, queries],
                query[:, :, queries],
                key[:, :, keys],
                value[:, :, keys],
                output[:, :, queries],
                normaliser[:, :, queries],
                causal,
                ctx.scale,
            )

        for group in ctx.layout.groups:
            for queries, keys, causal in _own_passes(group):
                of_query[:, :, queries], of_key[:, :, keys], of_value[:, :, keys] = one_pass(queries, keys, causal)
            for queries, keys, causal in _prompt_pass(group):
                for total, part in zip(
                    (of_query[:, :, queries], of_key[:, :, keys], of_value[:, :, keys]),
                    one_pass(queries, keys, causal),
                    strict=True,
                ):
                    total += part
        return of_query, _added_up(of_key, shared_key), _added_up(of_value, shared_value), None, None


def _for_every_head(states: Tensor, query: Tensor) -> Tensor:
    """[1, H_kv, L, D] with each head repeated for the query heads that share it, [1, H, L, D]."""
    return states.repeat_interleave(query.shape[1] // states.shape[1], dim=1)


def _added_up(gradient: Tensor, states: Tensor) -> Tensor:
    """The gradient of `states` from that of its repeated heads."""
    return gradient if gradient.shape == states.shape else gradient.unflatten(1, (states.shape[1], -1)).sum(2)


def _own_passes(group: GroupSpan) -> list[Pass]:
    return [(part, part, True) for part in (group.prompt, *group.completions)]


def _prompt_pass(group: GroupSpan) -> list[Pass]:
    return [(group.block, group.prompt, False)] if group.completions else []


def _forward(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attention and its normaliser, the log-sum-exp of the scores [1, H, queries]."""
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output, normaliser = operator(query, key, value, 0.0, causal, scale=scale)
    return output, normaliser


def _backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    normaliser: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    of_query, of_key, of_value = operator(gradient, query, key, value, output, normaliser, 0.0, causal, scale=scale)
    return of_query, of_key, of_value
