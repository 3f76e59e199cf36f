"""What the tests of both engines do with weights and log-probs, and what all tests here need."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence

import pytest
import torch

from observe_r1.experience import Completion, EncodedPrompt, GroupSlice
from observe_r1.policy import Policy
from observe_r1.rollout import SamplingOptions

NEEDS_VLLM = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(1800),  # servers start slowly on a loaded machine, and some tests start them again
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


def changed(policy: Policy, seed: int, by: float = 0.05) -> None:
    """Moves every weight in place, as an optimizer does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * weight.std().nan_to_num(1.0) * by)


def largest_difference(
    policy: Policy, prompts: Sequence[EncodedPrompt], groups: Sequence[Sequence[Completion]], sampling: SamplingOptions
) -> float:
    """Between the log-probs of the sampler and of the trainer, over all tokens."""
    slices = [GroupSlice(p, [c.token_ids for c in group]) for p, group in zip(prompts, groups, strict=True)]
    with torch.no_grad():
        trainer = policy(slices, sampling.temperature).logprobs
    sampler = torch.cat([completion.sampler_logprobs for group in groups for completion in group])
    return float((sampler - trainer).abs().max())


def lengthened(prompt: EncodedPrompt) -> EncodedPrompt:
    """Behind 200 tokens of text: a prompt shorter than a block is not in the prefix cache."""
    text = torch.full((200,), int(prompt.token_ids[-1]))
    types = torch.cat([torch.zeros_like(text), prompt.mm_token_type_ids])
    return dataclasses.replace(prompt, token_ids=torch.cat([text, prompt.token_ids]), mm_token_type_ids=types)
