"""Hugging Face rollouts on the tiny policy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from observe_r1.encoding import PromptEncoder, PromptOptions
from observe_r1.experience import EncodedPrompt, GroupSlice, Prompt
from observe_r1.ladder.reader import LadderDataset
from observe_r1.loading import PolicyOptions, load_policy, load_processor
from observe_r1.policy import Policy
from observe_r1.rollout import HFRollout, SamplingOptions


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy(PolicyOptions("quickstart", gradient_checkpointing=False))


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    return PromptEncoder(load_processor("quickstart", PromptOptions()), PromptOptions(system_prompt=None))


@pytest.fixture(scope="module")
def prompts(tiny_ladder: Path, encoder: PromptEncoder) -> list[EncodedPrompt]:
    """Questions of different lengths, one of them without an image."""
    ladder = LadderDataset(tiny_ladder)
    samples = [ladder[position] for position in range(6)]
    kept = [sample for sample in samples if isinstance(sample, Prompt)]
    text_only = Prompt("text", "test", [{"role": "user", "content": "How many?"}], [], kept[0].gold)
    encoded = [encoder.encode(prompt) for prompt in (*kept, text_only)]
    return [prompt for prompt in encoded if isinstance(prompt, EncodedPrompt)]


@pytest.fixture
def engine(policy: Policy, encoder: PromptEncoder) -> HFRollout:
    engine = HFRollout(sequences_per_batch=12)
    engine.setup(policy, encoder.tokenizer)
    return engine


SAMPLING = SamplingOptions(group_size=4, temperature=1.3, max_new_tokens=20)


def test_sampler_logprobs_are_the_trainers(engine: HFRollout, policy: Policy, prompts: list[EncodedPrompt]) -> None:
    """The parity every engine has to keep: same tokens, same distribution."""
    groups = engine.generate(prompts, SAMPLING, seed=1)
    slices = [
        GroupSlice(prompt, [completion.token_ids for completion in group])
        for prompt, group in zip(prompts, groups, strict=True)
    ]
    with torch.no_grad():
        trainer = policy(slices, SAMPLING.temperature).logprobs
    sampler = torch.cat([completion.sampler_logprobs for group in groups for completion in group])
    torch.testing.assert_close(sampler, trainer, rtol=0, atol=2e-5)


def test_the_seed_decides(engine: HFRollout, prompts: list[EncodedPrompt]) -> None:
    one, same, other = (engine.generate(prompts, SAMPLING, seed) for seed in (1, 1, 2))
    texts = [[completion.text for group in groups for completion in group] for groups in (one, same, other)]
    assert texts[0] == texts[1] != texts[2]


def test_a_completion_depends_on_its_place_in_the_call_only(
    policy: Policy, encoder: PromptEncoder, prompts: list[EncodedPrompt]
) -> None:
    """Not on how many are generated at once, nor on the prompts that follow."""
    texts = []
    for sequences_per_batch, count in ((1, 7), (8, 7), (1000, 7), (1000, 2)):
        engine = HFRollout(sequences_per_batch)
        engine.setup(policy, encoder.tokenizer)
        groups = engine.generate(prompts[:count], SAMPLING, seed=1)
        texts.append([completion.text for group in groups for completion in group])
    assert texts[0] == texts[1] == texts[2]
    assert texts[3] == texts[0][:8]


def test_a_model_in_training_generates_the_same(
    engine: HFRollout, encoder: PromptEncoder, prompts: list[EncodedPrompt]
) -> None:
    """Gradient checkpointing would drop the cache."""
    expected = [c.text for group in engine.generate(prompts, SAMPLING, seed=1) for c in group]
    policy = load_policy(PolicyOptions("quickstart", gradient_checkpointing=True)).train()
    engine = HFRollout()
    engine.setup(policy, encoder.tokenizer)
    assert [c.text for group in engine.generate(prompts, SAMPLING, seed=1) for c in group] == expected
    assert all(module.training for module in policy.modules())


def test_no_prompts_give_no_completions(engine: HFRollout) -> None:
    assert engine.generate([], SAMPLING, seed=1) == []


def test_sampling_leaves_the_random_state_alone(engine: HFRollout, prompts: list[EncodedPrompt]) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    engine.generate(prompts[:1], SAMPLING, seed=5)
    assert torch.equal(torch.rand(4), expected)


def test_completions_end_where_the_model_ended(engine: HFRollout, prompts: list[EncodedPrompt], policy: Policy) -> None:
    end = policy.model.generation_config.eos_token_id
    for group in engine.generate(prompts, SamplingOptions(8, 1.0, max_new_tokens=14), seed=2):
        for completion in group:
            assert 1 <= len(completion) <= 14
            assert len(completion.sampler_logprobs) == len(completion)
            assert end not in completion.token_ids[:-1]
            assert completion.truncated == (int(completion.token_ids[-1]) != end)
            assert not completion.truncated or len(completion) == 14


def test_vision_tokens_are_never_sampled(encoder: PromptEncoder, prompts: list[EncodedPrompt]) -> None:
    """Even by a policy that wants nothing else."""
    policy = load_policy(PolicyOptions("quickstart", gradient_checkpointing=False))
    head = torch.nn.Linear(policy.model.config.text_config.hidden_size, policy.model.config.text_config.vocab_size)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    with torch.no_grad():
        head.bias[list(policy.forbidden_token_ids)] = 50.0
    policy.model.set_output_embeddings(head)
    engine = HFRollout()
    engine.setup(policy, encoder.tokenizer)
    groups = engine.generate(prompts, SamplingOptions(4, 1.0, max_new_tokens=16), seed=0)
    sampled = torch.cat([completion.token_ids for group in groups for completion in group])
    assert len(policy.forbidden_token_ids) == 4
    assert not torch.isin(sampled, torch.tensor(policy.forbidden_token_ids)).any()


def test_the_checkpoints_sampling_defaults_do_not_leak(
    engine: HFRollout, policy: Policy, prompts: list[EncodedPrompt]
) -> None:
    """Qwen ships repetition_penalty 1.05, top_k 1 and temperature 0.1 in generation_config.json."""
    expected = [c.text for group in engine.generate(prompts, SAMPLING, seed=1) for c in group]
    shipped = policy.model.generation_config
    changed = {"repetition_penalty": 1.5, "top_k": 1, "temperature": 0.1, "no_repeat_ngram_size": 2}
    saved = {name: getattr(shipped, name) for name in changed}
    for name, value in changed.items():
        setattr(shipped, name, value)
    try:
        got = [c.text for group in engine.generate(prompts, SAMPLING, seed=1) for c in group]
        assert policy.model.generation_config is shipped
    finally:
        for name, value in saved.items():
            setattr(shipped, name, value)
    assert got == expected


def test_greedy_is_the_argmax_of_the_trainer(engine: HFRollout, policy: Policy, prompts: list[EncodedPrompt]) -> None:
    groups = engine.generate(prompts, SamplingOptions(1, 0.0, max_new_tokens=12), seed=0)
    for prompt, (completion,) in zip(prompts, groups, strict=True):
        with torch.no_grad():
            chosen = policy([GroupSlice(prompt, [completion.token_ids])], 1.0).logprobs
        for token in range(0, policy.model.config.text_config.vocab_size, 7):
            if token in policy.forbidden_token_ids:
                continue
            changed = completion.token_ids.clone()
            changed[-1] = token
            with torch.no_grad():
                other = policy([GroupSlice(prompt, [changed])], 1.0).logprobs
            assert float(other[-1]) <= float(chosen[-1]) + 1e-5


def test_prompts_are_prefilled_within_the_limit_of_tokens(
    policy: Policy, encoder: PromptEncoder, prompts: list[EncodedPrompt]
) -> None:
    lengths = [prompt.token_ids.numel() for prompt in prompts]
    engine = HFRollout(sequences_per_batch=100, prompt_tokens_per_batch=lengths[0] + lengths[1])
    batches = list(engine.batches(prompts, group_size=4))
    assert [prompt for batch in batches for prompt in batch] == prompts
    assert len(batches) > 1
    assert all(sum(p.token_ids.numel() for p in batch) <= lengths[0] + lengths[1] for batch in batches)
    assert [len(batch) for batch in HFRollout(prompt_tokens_per_batch=1).batches(prompts, 4)] == [1] * len(prompts)
    engine.setup(policy, encoder.tokenizer)
    whole = HFRollout()
    whole.setup(policy, encoder.tokenizer)
    found, expected = (
        [c.token_ids.tolist() for group in e.generate(prompts, SAMPLING, seed=3) for c in group]
        for e in (engine, whole)
    )
    assert found == expected
