"""Packed rows and the attention over them, against the rule written down as a mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import build_model, random_group

from observe_r1.model_inputs import prompt_positions
from observe_r1.shared_prefix import BACKENDS, PrefixAttention, pack
from observe_r1.shared_prefix.layout import GroupSpan, RowLayout, may_attend

SHAPES = st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(1, 7), max_size=4)), min_size=1, max_size=3)


def layout_of(shapes: list[tuple[int, list[int]]]) -> RowLayout:
    end, groups = 0, []
    for prompt, completions in shapes:
        span = slice(end, end + prompt)
        end += prompt
        parts = []
        for length in completions:
            parts.append(slice(end, end + length))
            end += length
        groups.append(GroupSpan(span, tuple(parts)))
    return RowLayout(end, tuple(groups))


@pytest.mark.parametrize("backend", ["sdpa", "two_pass", "varlen"])
@settings(max_examples=40)
@given(shapes=SHAPES, key_value_heads=st.sampled_from([1, 2, 4]), seed=st.integers(0, 999))
def test_every_backend_follows_the_mask(
    backend: str, shapes: list[tuple[int, list[int]]], key_value_heads: int, seed: int
) -> None:
    layout = layout_of(shapes)
    generator = torch.Generator().manual_seed(seed)

    def states(heads: int) -> torch.Tensor:
        drawn = torch.randn(1, heads, layout.length, 8, dtype=torch.float64, generator=generator)
        return drawn.requires_grad_()

    query, key, value, upstream = states(4), states(key_value_heads), states(key_value_heads), states(4).detach()
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=may_attend(layout), scale=0.4, enable_gqa=True
    )
    found = BACKENDS[backend](query, key, value, PrefixAttention(layout, backend), 0.4)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for got, wanted in zip(
        torch.autograd.grad(found, (query, key, value), upstream),
        torch.autograd.grad(expected, (query, key, value), upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_the_rule_of_a_small_row() -> None:
    """Written out by hand: a prompt of 2 with completions of 1 and 2 tokens, then a prompt alone."""
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    assert may_attend(layout_of([(2, [1, 2]), (1, [])])).int().tolist() == expected


def test_a_row_holds_every_token_once() -> None:
    model = build_model()
    generator = torch.Generator().manual_seed(0)
    slices = [random_group(model, 4, [(4, 4)], [3, 1, 0, 5], generator), random_group(model, 6, [], [2], generator)]
    positions = [prompt_positions(model.model, part.prompt) for part in slices]
    row = pack(slices, positions)
    (first, second), (a, _, _, d), (e,) = (part.prompt for part in slices), slices[0].completions, slices[1].completions
    assert torch.equal(row.token_ids, torch.cat([first.token_ids, a[:-1], d[:-1], second.token_ids, e[:-1]]))
    assert torch.equal(row.targets, torch.cat([a, slices[0].completions[1], d, e]))
    prompt, start = len(first.token_ids), len(first.token_ids) + 2 + 4
    end = start + len(second.token_ids)
    # the end of the prompt predicts every first token, each token the next one
    assert row.source.tolist() == [
        *[prompt - 1, prompt, prompt + 1],
        prompt - 1,
        *[prompt - 1, prompt + 2, prompt + 3, prompt + 4, prompt + 5],
        *[end - 1, end],
    ]
    following = int(positions[0].max()) + 1
    assert row.positions[:, prompt : prompt + 2].tolist() == [[following, following + 1]] * 3
    assert row.positions[:, prompt + 2 : start].tolist() == [[following + i for i in range(4)]] * 3


def test_gathered_keys_add_up_their_gradient_in_float32() -> None:
    """256 equal contributions of 1 to a bf16 key beyond 256 would all be lost in bf16."""
    layout = layout_of([(1, [1] * 600)])
    states = torch.ones(layout.length, 1, 8, dtype=torch.bfloat16, requires_grad=True)
    from observe_r1.shared_prefix.attention import _Gather

    _Gather.apply(states, layout.varlen.keys).sum().backward()
    assert states.grad is not None
    assert states.grad[0, 0, 0] == 600  # 601 in bf16
