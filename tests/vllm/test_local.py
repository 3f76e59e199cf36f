"""vLLM in the trainer's process: the trainer's distribution, tokens and prompts, before and after syncs."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch

from observe_r1.encoding import PromptEncoder
from observe_r1.experience import EncodedPrompt
from observe_r1.loading import LoraOptions, PolicyOptions, load_policy
from observe_r1.policy import Policy
from observe_r1.rollout import HFRollout, SamplingOptions, VLLMLocalRollout
from observe_r1.rollout.vllm_requests import unexpanded_token_ids

from .comparison import NEEDS_VLLM, changed, largest_difference

pytestmark = NEEDS_VLLM

SAMPLING = SamplingOptions(group_size=4, temperature=1.3, max_new_tokens=20)


@pytest.fixture(autouse=True)
def same_weights(engine: VLLMLocalRollout, policy: Policy) -> None:
    """Every test starts with the shipped weights in policy and engine, and with empty caches."""
    shipped = load_policy(PolicyOptions("quickstart", gradient_checkpointing=False))
    policy.load_state_dict(shipped.state_dict())
    engine.update_weights(policy.named_weights(), version=0)


def test_sampler_logprobs_are_the_trainers(
    engine: VLLMLocalRollout, policy: Policy, prompts: list[EncodedPrompt]
) -> None:
    """Without an image, with one and with two, at a temperature; and again from the prefix cache."""
    for seed in (1, 2):
        groups = engine.generate(prompts, SAMPLING, seed)
        assert [len(group) for group in groups] == [4] * len(prompts)
        assert largest_difference(policy, prompts, groups, SAMPLING) < 1e-4


def test_after_every_weight_has_changed(engine: VLLMLocalRollout, policy: Policy, prompts: list[EncodedPrompt]) -> None:
    before = engine.generate(prompts, SAMPLING, seed=1)
    changed(policy, seed=3)
    engine.update_weights(policy.named_weights(), version=1)
    assert largest_difference(policy, prompts, before, SAMPLING) > 0.1
    after = engine.generate(prompts, SAMPLING, seed=1)
    assert largest_difference(policy, prompts, after, SAMPLING) < 1e-4
    assert engine.version == 1


def test_greedy_answers_are_those_of_hugging_face(
    engine: VLLMLocalRollout, policy: Policy, encoder: PromptEncoder, prompts: list[EncodedPrompt]
) -> None:
    plain = HFRollout()
    plain.setup(policy, encoder.processor)
    greedy = SamplingOptions(2, 0.0, max_new_tokens=24)
    expected, got = (one.generate(prompts, greedy, seed=0) for one in (plain, engine))
    for one, other in zip(expected, got, strict=True):
        assert [c.token_ids.tolist() for c in one] == [c.token_ids.tolist() for c in other]
        assert [(c.text, c.truncated) for c in one] == [(c.text, c.truncated) for c in other]
    assert largest_difference(policy, prompts, got, greedy) < 1e-4


def test_the_seed_decides(engine: VLLMLocalRollout, prompts: list[EncodedPrompt]) -> None:
    one, same, other = (engine.generate(prompts, SAMPLING, seed) for seed in (1, 1, 2))
    tokens = [[c.token_ids.tolist() for group in groups for c in group] for groups in (one, same, other)]
    assert tokens[0] == tokens[1] != tokens[2]
    assert len({str(row) for row in tokens[0]}) > 0.8 * len(tokens[0])  # completions of a group have their own seeds


def test_random_states_are_left_alone(engine: VLLMLocalRollout, prompts: list[EncodedPrompt]) -> None:
    states = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]  # type: ignore[index]
    engine.generate(prompts, SAMPLING, seed=1)
    after = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]  # type: ignore[index]
    assert after == states


def test_completions_end_where_the_model_ended(
    engine: VLLMLocalRollout, policy: Policy, prompts: list[EncodedPrompt]
) -> None:
    (end,) = policy.end_token_ids.tolist()
    completions = [c for g in engine.generate(prompts, SamplingOptions(8, 1.0, max_new_tokens=14), 2) for c in g]
    assert {c.truncated for c in completions} == {True, False}
    for completion in completions:
        assert 1 <= len(completion) <= 14
        assert len(completion.sampler_logprobs) == len(completion)
        assert end not in completion.token_ids[:-1]
        assert completion.truncated == (int(completion.token_ids[-1]) != end)
        assert not completion.truncated or len(completion) == 14


def test_vision_tokens_are_never_sampled(
    engine: VLLMLocalRollout, policy: Policy, prompts: list[EncodedPrompt]
) -> None:
    """Even by a policy that wants little else: they have the row of its favourite first token, enlarged."""
    sampling = SamplingOptions(16, 1.0, max_new_tokens=24)
    forbidden = torch.tensor(policy.forbidden_token_ids)
    text = prompts[-2].token_ids[None]
    with torch.no_grad():
        favourite = policy.transformer(input_ids=text).logits[0, -1].argmax()
        head = policy.transformer.get_output_embeddings().weight
        head[forbidden] = 1.5 * head[favourite]
        probabilities = policy.transformer(input_ids=text).logits[0, -1].softmax(dim=-1)
    assert float(probabilities[forbidden].sum()) > 0.9
    engine.update_weights(policy.named_weights(), version=1)
    groups = engine.generate(prompts, sampling, seed=0)
    sampled = torch.cat([completion.token_ids for group in groups for completion in group])
    assert len(forbidden) == 4
    assert not torch.isin(sampled, forbidden).any()
    assert largest_difference(policy, prompts, groups, sampling) < 1e-4


def test_adapters_are_merged(engine: VLLMLocalRollout, prompts: list[EncodedPrompt]) -> None:
    options = LoraOptions(rank=4, alpha=8, target_modules=["q_proj", "o_proj", "down_proj", "qkv"])
    adapted = load_policy(PolicyOptions("quickstart", gradient_checkpointing=False, lora=options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if ".lora_B." in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)
    before = [weight.clone() for weight in adapted.parameters()]
    base = engine.generate(prompts, SAMPLING, seed=1)
    assert largest_difference(adapted, prompts, base, SAMPLING) > 0.05
    engine.update_weights(adapted.named_weights(), version=1)
    groups = engine.generate(prompts, SAMPLING, seed=1)
    assert largest_difference(adapted, prompts, groups, SAMPLING) < 1e-4
    assert all(torch.equal(one, other) for one, other in zip(before, adapted.parameters(), strict=True))


def test_a_prompt_that_vllm_reads_otherwise_is_an_error(engine: VLLMLocalRollout, prompts: list[EncodedPrompt]) -> None:
    one = prompts[-1]
    (_, small), width = one.prompt.images, one.token_ids.numel()
    other = dataclasses.replace(one, prompt=dataclasses.replace(one.prompt, images=[small, small]))
    with pytest.raises(RuntimeError, match=rf"as \d+ tokens, the trainer as {width}"):
        engine.generate([other], SAMPLING, seed=0)


def test_placeholders_are_collapsed_image_by_image(encoder: PromptEncoder, prompts: list[EncodedPrompt]) -> None:
    for prompt in prompts:
        text = encoder.processor.apply_chat_template(
            encoder.messages(prompt.prompt), tokenize=False, add_generation_prompt=True
        )
        expected = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert unexpanded_token_ids(prompt).tolist() == expected


def test_images_side_by_side_keep_one_placeholder_each(prompts: list[EncodedPrompt]) -> None:
    """As in chat templates without a token between images."""
    prompt = prompts[-1]
    assert prompt.vision is not None
    counts = (prompt.vision.image_grid_thw.prod(dim=1) // 4).tolist()
    ids, types = torch.tensor([5, *[7] * sum(counts), 6]), torch.tensor([0, *[1] * sum(counts), 0])
    joined = dataclasses.replace(prompt, token_ids=ids, mm_token_type_ids=types)
    assert unexpanded_token_ids(joined).tolist() == [5, 7, 7, 6]


def test_stale_weights_are_an_error(engine: VLLMLocalRollout, policy: Policy, prompts: list[EncodedPrompt]) -> None:
    changed(policy, seed=1)
    with pytest.raises(RuntimeError, match=r"add observe_r1\.callbacks\.VLLMWeightSync"):
        engine.generate(prompts, SAMPLING, seed=0)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (SamplingOptions(4, 1.0, top_p=0.9, max_new_tokens=20), "after the cut"),
        (SamplingOptions(4, 0.001, max_new_tokens=20), r"takes 0 or 0\.01 to 2\.0"),
        (SamplingOptions(4, 1.0, max_new_tokens=2000), "raise rollout.max_model_len"),
    ],
)
def test_what_it_cannot_do_is_refused(
    engine: VLLMLocalRollout, prompts: list[EncodedPrompt], sampling: SamplingOptions, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        engine.generate(prompts, sampling, seed=0)
    assert engine.generate([], SAMPLING, seed=0) == []


def test_sleeping_needs_a_gpu_and_is_harmless_without(
    engine: VLLMLocalRollout, policy: Policy, prompts: list[EncodedPrompt]
) -> None:
    engine.sleep()
    engine.wake()
    groups = engine.generate(prompts, SAMPLING, seed=1)
    assert largest_difference(policy, prompts, groups, SAMPLING) < 1e-4
