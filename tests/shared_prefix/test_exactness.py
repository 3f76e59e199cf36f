"""Log-probs and gradients of the shared-prefix forward equal those of the repeated one, for any ragged groups."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import FAMILIES, build_model, random_group
from torch import Tensor

from observe_r1.experience import GroupSlice
from observe_r1.policy import Policy
from observe_r1.shared_prefix import NAME
from observe_r1.shared_prefix.two_pass import two_pass_runs
from observe_r1.text_attention import set_text_attention

from .conftest import lifted_casts, naive_logprobs

BACKENDS = ("sdpa", "two_pass", "varlen")
LIMIT = {torch.float32: 1e-5, torch.float64: 1e-10}
SIDES = st.sampled_from([2, 4, 6, 8])


@cache
def model_of(family: str, key_value_heads: int, dtype: torch.dtype) -> Any:
    model = build_model(family, key_value_heads=key_value_heads, seed=key_value_heads)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)  # at its initial size attention hardly tells tokens apart
    return model.to(dtype).train()


@st.composite
def ragged_groups(draw: st.DrawFn) -> list[tuple[int, list[tuple[int, int]], list[int]]]:
    """Text tokens, image grids and completion lengths of one to three groups; at least one token is predicted."""
    groups = draw(
        st.lists(
            st.tuples(
                st.integers(1, 12),
                st.lists(st.tuples(SIDES, SIDES), max_size=3),
                st.lists(st.integers(0, 24), min_size=1, max_size=6),
            ),
            min_size=1,
            max_size=3,
        )
    )
    groups[0][2][0] = max(groups[0][2][0], 1)
    return groups


def gradients(model: Any) -> dict[str, Tensor]:
    """Of every parameter, zero where there is none; clears them."""
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    return found


@contextmanager
def checkpointed(model: Any, reentrant: bool | None) -> Iterator[None]:
    """Gradient checkpointing of one of the two kinds; None for none."""
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=50)
@given(
    shapes=ragged_groups(),
    key_value_heads=st.sampled_from([1, 2, 4]),
    temperature=st.sampled_from([1.0, 0.7, 1.3]),
    chunk_tokens=st.sampled_from([7, 64]),
    checkpointing=st.sampled_from([None, None, False, True]),
    seed=st.integers(0, 2**16),
)
def test_equal_to_the_repeated_forward(
    family: str,
    backend: str,
    dtype: torch.dtype,
    shapes: list[tuple[int, list[tuple[int, int]], list[int]]],
    key_value_heads: int,
    temperature: float,
    chunk_tokens: int,
    checkpointing: bool | None,
    seed: int,
) -> None:
    model = model_of(family, key_value_heads, dtype)
    generator = torch.Generator().manual_seed(seed)
    slices = [random_group(model, text, grids, lengths, generator) for text, grids, lengths in shapes]
    policy = Policy(model, 0, chunk_tokens)
    policy._backend = backend  # check and choice are tested elsewhere
    weight = torch.randn(sum(len(c) for part in slices for c in part.completions), generator=generator).to(dtype)
    with lifted_casts():
        set_text_attention(model, "sdpa")
        expected, expected_entropy = naive_logprobs(model, slices, temperature, policy.forbidden_token_ids)
        (expected * weight).mean().backward()
        expected_gradients = gradients(model)
        set_text_attention(model, NAME)
        with checkpointed(model, checkpointing):
            output = policy(slices, temperature, with_entropy=True)
            (output.logprobs * weight).mean().backward()
        found_gradients = gradients(model)
    assert policy.shares_prefixes
    torch.testing.assert_close(output.logprobs, expected, rtol=0, atol=LIMIT[dtype])
    torch.testing.assert_close(output.entropy, expected_entropy, rtol=0, atol=LIMIT[dtype])
    for name, value in found_gradients.items():
        torch.testing.assert_close(
            value, expected_gradients[name], rtol=0, atol=LIMIT[dtype], msg=lambda text, name=name: f"{name}: {text}"
        )


def test_the_cpu_passes_run_here() -> None:
    """Otherwise the cases of `two_pass` above would say nothing."""
    assert two_pass_runs(torch.float32)
    assert two_pass_runs(torch.float64)
    assert two_pass_runs(torch.bfloat16)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trained", ["adapters", "text only"])
def test_partly_trained_policies(family: str, trained: str) -> None:
    """Adapters (on the head too) and a frozen vision tower whose features come from outside."""
    model = build_model(family, seed=3)
    generator = torch.Generator().manual_seed(4)
    slices = [
        random_group(model, 5, [(4, 6), (8, 4)], [3, 9, 1], generator),
        random_group(model, 4, [], [6], generator),
    ]
    if trained == "adapters":
        from peft import LoraConfig, get_peft_model

        peft_model: Any = get_peft_model(
            model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "lm_head"], init_lora_weights=False)
        )
        policy = Policy(peft_model, 0, 5)
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("visual" not in name)
        policy = Policy(model, 0, 5)
    assert not policy.trains_vision
    prompts = policy.encode_images([part.prompt for part in slices])
    assert prompts[0].vision is not None
    assert prompts[0].vision.features is not None
    encoded = [GroupSlice(prompt, part.completions) for prompt, part in zip(prompts, slices, strict=True)]
    found = policy(encoded, 0.9).logprobs
    found.mean().backward()
    found_gradients = gradients(policy)
    assert policy.shares_prefixes
    set_text_attention(policy.transformer, "sdpa")
    expected, _ = naive_logprobs(policy.transformer, slices, 0.9, policy.forbidden_token_ids)
    expected.mean().backward()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    expected_gradients = gradients(policy)
    assert any(value.abs().max() > 1e-4 for value in expected_gradients.values())
    for name, value in found_gradients.items():
        torch.testing.assert_close(value, expected_gradients[name], rtol=0, atol=1e-5)
