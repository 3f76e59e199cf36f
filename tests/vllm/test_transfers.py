"""What a transfer of weights has to do, and what is left of one that broke off: each with an engine of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from observe_r1.encoding import PromptEncoder
from observe_r1.experience import EncodedPrompt, GroupSlice
from observe_r1.loading import PolicyOptions, load_policy
from observe_r1.policy import Policy
from observe_r1.rollout import SamplingOptions, VLLMLocalRollout

from .comparison import NEEDS_VLLM, lengthened

pytestmark = NEEDS_VLLM


@pytest.fixture
def fresh_policy() -> Policy:
    return load_policy(PolicyOptions("quickstart", gradient_checkpointing=False))


@pytest.fixture
def fresh_engine(fresh_policy: Policy, encoder: PromptEncoder) -> Iterator[VLLMLocalRollout]:
    """One for each test: a request that fails stays in it."""
    engine = VLLMLocalRollout(cache_gib=0.25, max_model_len=1024)
    engine.setup(fresh_policy, encoder.processor)
    yield engine
    engine.close()


@pytest.mark.parametrize("forgotten", ["reset_prefix_cache", "reset_encoder_cache"])
def test_every_cache_has_to_be_reset(
    fresh_engine: VLLMLocalRollout,
    fresh_policy: Policy,
    prompts: list[EncodedPrompt],
    monkeypatch: pytest.MonkeyPatch,
    forgotten: str,
) -> None:
    """Without it vLLM fails or serves what the old weights computed. (The third cache holds pixels, in one process.)"""
    sampling = SamplingOptions(group_size=2, max_new_tokens=16)
    llm = fresh_engine._llm
    monkeypatch.setattr(llm.llm_engine if forgotten == "reset_encoder_cache" else llm, forgotten, lambda: None)
    # a prompt shorter than a block of the cache is not in the prefix cache
    long = [prompts[0]] if forgotten != "reset_prefix_cache" else [lengthened(prompts[0])]
    fresh_engine.generate(long, sampling, seed=1)
    with torch.no_grad():
        for weight in fresh_policy.parameters():
            weight.mul_(1.2)
    fresh_engine.update_weights(fresh_policy.named_weights(), version=1)
    try:
        (group,) = fresh_engine.generate(long, sampling, seed=1)
    except Exception as error:
        assert "cache" in str(error).lower(), error  # noqa: PT017 - some resets are missed by a failure, some are not
        return
    with torch.no_grad():
        trainer = fresh_policy([GroupSlice(long[0], [c.token_ids for c in group])], 1.0).logprobs
    assert float((torch.cat([c.sampler_logprobs for c in group]) - trainer).abs().max()) > 1e-3


def test_a_transfer_that_broke_off_is_an_error(
    fresh_engine: VLLMLocalRollout, fresh_policy: Policy, prompts: list[EncodedPrompt]
) -> None:
    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        weights = fresh_policy.named_weights()
        for _ in range(20):
            yield next(weights)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        fresh_engine.update_weights(broken(), version=1)
    with pytest.raises(RuntimeError, match="broke off"):
        fresh_engine.generate(prompts, SamplingOptions(2), seed=0)
