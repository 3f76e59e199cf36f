"""Decoding of groups against `generate` of transformers, on models with random weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from random_models import FAMILIES, build_model, random_prompt
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, Qwen2Config, Qwen2ForCausalLM

from observe_r1.answers import Gold
from observe_r1.experience import EncodedPrompt, GroupSlice, Prompt
from observe_r1.model_inputs import encode_images
from observe_r1.policy import Policy
from observe_r1.rollout import SamplingOptions, decoding
from observe_r1.rollout.decoding import choose, decode_groups

END = torch.tensor([1, 2, 10, 11])
GRIDS: list[list[tuple[int, int]]] = [[(4, 4)], [], [(4, 8), (8, 4)], [(2, 6)]]
SIZE, STEPS = 3, 14


def make_policy(family: str = "qwen2_5_vl") -> Policy:
    """A policy whose logits depend on every token of the context, and that often ends."""
    model = build_model(family, vocabulary=32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 6
    return Policy(model, pad_token_id=0).eval()


def make_prompts(policy: Policy, grids: Sequence[Sequence[tuple[int, int]]] = GRIDS) -> list[EncodedPrompt]:
    generator = torch.Generator().manual_seed(7)
    return [random_prompt(policy.model, 5 + 4 * number, images, generator) for number, images in enumerate(grids)]


def make_noise(prompts: int, size: int = SIZE, steps: int = STEPS) -> Tensor:
    return torch.rand(prompts * size, steps, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def decode(policy: Policy, prompts: Sequence[EncodedPrompt], sampling: SamplingOptions) -> list[list[int]]:
    """Tokens of every sequence up to its end."""
    noise = None if sampling.greedy else make_noise(len(prompts), sampling.group_size, sampling.max_new_tokens)
    with torch.no_grad():
        tokens, logprobs = decode_groups(policy, prompts, sampling, END, noise)
    assert tokens.shape == logprobs.shape
    return [until_end(row) for row in tokens]


def until_end(tokens: Tensor) -> list[int]:
    ends = torch.isin(tokens, END).nonzero()
    return tokens[: int(ends[0]) + 1 if len(ends) else None].tolist()


@dataclass
class Decide(LogitsProcessor):  # type: ignore[misc]
    """Leaves `generate` one token to choose: greedily, or by noise [rows, steps] where there is some."""

    forbidden: Tensor
    sampling: SamplingOptions
    noise: Tensor | None
    steps: int = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.double().index_fill(1, self.forbidden, float("-inf"))
        if self.noise is not None:
            picks = zip(scores, self.noise[:, self.steps], strict=True)
            scores = torch.stack([self.one_hot(row, float(u)) for row, u in picks])
        self.steps += 1
        return scores

    def one_hot(self, scores: Tensor, u: float) -> Tensor:
        probabilities = (scores / self.sampling.temperature).softmax(0)
        order = probabilities.argsort(descending=True)
        # the fewest tokens that reach top_p together
        outside = order[1 + int((probabilities[order].cumsum(0) < self.sampling.top_p).sum()) :]
        if self.sampling.top_p < 1:
            probabilities[outside] = 0
        reached = probabilities.cumsum(0) > u * probabilities.sum()
        return torch.zeros_like(scores).index_fill(0, reached.nonzero()[0], 1.0)


def generate(policy: Policy, prompts: Sequence[EncodedPrompt], sampling: SamplingOptions) -> list[list[int]]:
    """The same by transformers, one prompt at a time, repeated with its pixels for every completion."""
    size, sequences = sampling.group_size, []
    config = GenerationConfig(
        do_sample=False, max_new_tokens=sampling.max_new_tokens, eos_token_id=END.tolist(), pad_token_id=0
    )
    noise = make_noise(len(prompts), size, sampling.max_new_tokens)
    for number, prompt in enumerate(prompts):
        own = None if sampling.greedy else noise[number * size : (number + 1) * size]
        inputs = {"input_ids": prompt.token_ids.expand(size, -1)}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if prompt.vision is not None:
            inputs["mm_token_type_ids"] = prompt.mm_token_type_ids.expand(size, -1)
            inputs["pixel_values"] = prompt.vision.pixel_values.repeat(size, 1)
            inputs["image_grid_thw"] = prompt.vision.image_grid_thw.repeat(size, 1)
        processor = Decide(policy.forbidden(policy.device), sampling, own)
        output = policy.model.generate(
            **inputs, generation_config=config, logits_processor=LogitsProcessorList([processor])
        )
        sequences += [until_end(row) for row in output[:, prompt.token_ids.numel() :]]
    return sequences


@pytest.fixture(scope="module", params=FAMILIES)
def policy(request: pytest.FixtureRequest) -> Policy:
    return make_policy(request.param)


@pytest.fixture(scope="module")
def qwen() -> Policy:
    return make_policy()


GREEDY = SamplingOptions(SIZE, 0.0, max_new_tokens=STEPS)
SAMPLED = SamplingOptions(SIZE, 1.2, max_new_tokens=STEPS)
NUCLEUS = SamplingOptions(SIZE, 0.8, top_p=0.9, max_new_tokens=STEPS)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, NUCLEUS], ids=["greedy", "sampled", "nucleus"])
def test_tokens_are_those_of_generate(policy: Policy, sampling: SamplingOptions) -> None:
    """Prompts with 0 to 2 images and of different lengths, decoded together, whose sequences end at different times."""
    prompts = make_prompts(policy)
    expected = generate(policy, prompts, sampling)
    assert decode(policy, prompts, sampling) == expected
    assert len({tuple(sequence) for sequence in expected}) > len(prompts) / 2
    if not sampling.greedy:
        assert len({len(sequence) for sequence in expected}) > 3


@pytest.mark.parametrize("grids", [[[]], [[], []], [[(4, 4)]]], ids=["text", "texts", "image"])
@pytest.mark.parametrize("size", [1, 4])
def test_small_batches(policy: Policy, grids: list[list[tuple[int, int]]], size: int) -> None:
    sampling = SamplingOptions(size, 1.0, max_new_tokens=6)
    prompts = make_prompts(policy, grids)
    assert decode(policy, prompts, sampling) == generate(policy, prompts, sampling)


def test_one_new_token(qwen: Policy) -> None:
    sampling = SamplingOptions(SIZE, 1.0, max_new_tokens=1)
    prompts = make_prompts(qwen)
    assert decode(qwen, prompts, sampling) == generate(qwen, prompts, sampling)


def test_features_of_images_replace_the_tower(policy: Policy) -> None:
    prompts = make_prompts(policy)
    encoded = [encode_images(policy.model.model, prompt) for prompt in prompts]
    expected = decode(policy, prompts, SAMPLED)
    with counted(policy) as seen:
        assert decode(policy, encoded, SAMPLED) == expected
    assert seen.patches == []


def test_logprobs_are_the_trainers(policy: Policy) -> None:
    prompts = make_prompts(policy)
    assert_parity(policy, prompts, atol=2e-5)


@pytest.mark.parametrize("half", ["weights", "autocast"])
def test_half_precision(half: str) -> None:
    policy = make_policy()
    if half == "weights":
        policy.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast"):
        assert_parity(policy, make_prompts(policy), atol=0.05)


def assert_parity(policy: Policy, prompts: Sequence[EncodedPrompt], atol: float) -> None:
    with torch.no_grad():
        tokens, logprobs = decode_groups(policy, prompts, SAMPLED, END, make_noise(len(prompts)))
        sequences = [torch.tensor(until_end(row)) for row in tokens]
        groups = [sequences[start : start + SIZE] for start in range(0, len(sequences), SIZE)]
        slices = [GroupSlice(prompt, group) for prompt, group in zip(prompts, groups, strict=True)]
        expected = policy(slices, SAMPLED.temperature).logprobs
    sampler = torch.cat([row[: len(sequence)] for row, sequence in zip(logprobs, sequences, strict=True)])
    torch.testing.assert_close(sampler, expected.float(), rtol=0, atol=atol)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("block", [1, 5])
def test_memory_settings_change_nothing(
    qwen: Policy, share: float, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = make_prompts(qwen)
    expected = decode(qwen, prompts, SAMPLED)
    monkeypatch.setattr(decoding, "LEAVING_SHARE", share)
    monkeypatch.setattr(decoding, "BLOCK_TOKENS", block)
    assert decode(qwen, prompts, SAMPLED) == expected


def test_what_the_model_remembers_is_not_read(qwen: Policy) -> None:
    """Transformers leave the positions of the last call in the model."""
    prompts = make_prompts(qwen)
    expected = decode(qwen, prompts, SAMPLED)
    qwen.model.model.rope_deltas = torch.full((len(prompts), 1), 1000)
    try:
        assert decode(qwen, prompts, SAMPLED) == expected
    finally:
        qwen.model.model.rope_deltas = None


def test_attention_is_put_back(qwen: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, config = make_prompts(qwen), qwen.model.config
    before = config.text_config._attn_implementation, config.vision_config._attn_implementation
    decode(qwen, prompts, SAMPLED)
    assert (config.text_config._attn_implementation, config.vision_config._attn_implementation) == before
    monkeypatch.setattr(decoding.GroupDecoder, "step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        decode(qwen, prompts, SAMPLED)
    assert (config.text_config._attn_implementation, config.vision_config._attn_implementation) == before


@dataclass
class Seen:
    """What passed through a model, call by call."""

    patches: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # padding left out


@contextmanager
def counted(policy: Policy) -> Iterator[Seen]:
    seen = Seen()

    def tower(_: Any, arguments: tuple[Any, ...]) -> None:
        seen.patches.append(len(arguments[0]))

    def text(_: Any, __: Any, named: dict[str, Any]) -> None:
        mask, embedded = named.get("attention_mask"), named["inputs_embeds"]
        seen.tokens.append(embedded.shape[:2].numel() if mask is None else int(mask.sum()))

    backbone = policy.model.model
    hooks = [
        backbone.visual.register_forward_pre_hook(tower),
        backbone.language_model.register_forward_pre_hook(text, with_kwargs=True),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def test_a_prompt_is_paid_for_once_and_finished_sequences_leave(policy: Policy) -> None:
    prompts = make_prompts(policy)
    with counted(policy) as seen:
        lengths = [len(sequence) for sequence in decode(policy, prompts, SAMPLED)]
    assert seen.patches == [sum(len(prompt.vision.pixel_values) for prompt in prompts if prompt.vision is not None)]
    assert seen.tokens[0] == sum(prompt.token_ids.numel() for prompt in prompts)
    # in a batch this small whatever ends leaves at once, and the last token of a sequence is never fed
    assert seen.tokens[1:] == [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    assert sum(seen.tokens[1:]) < 0.7 * len(lengths) * max(lengths)


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_frequencies_are_the_probabilities(qwen: Policy, top_p: float) -> None:
    """Pearson's statistic of one step's choices, against its 99.99 % quantile for at most 27 degrees of freedom."""
    (prompt,) = make_prompts(qwen, [[(4, 4)]])
    sampling = SamplingOptions(8000, 1.0, top_p, max_new_tokens=1)
    with torch.no_grad():
        tokens, logprobs = decode_groups(qwen, [prompt], sampling, END, make_noise(1, 8000, 1))
        vocabulary = [GroupSlice(prompt, [torch.tensor([token])]) for token in range(32)]
        probabilities = qwen(vocabulary, 1.0).logprobs.double().exp()
    torch.testing.assert_close(logprobs[:, 0].exp(), probabilities.float()[tokens[:, 0]])
    probabilities[list(qwen.forbidden_token_ids)] = 0
    order = probabilities.argsort(descending=True)
    probabilities[order[1 + int((probabilities[order].cumsum(0) < top_p).sum()) :]] = 0
    possible = probabilities > 0
    counts = torch.bincount(tokens[:, 0], minlength=32)
    assert int(counts[~possible].sum()) == 0
    expected = (probabilities / probabilities.sum() * 8000)[possible]
    assert float(((counts[possible] - expected) ** 2 / expected).sum()) < 63


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53])
def test_impossible_tokens_are_never_chosen(u: float) -> None:
    logprobs = torch.tensor([0.0, 0.3, 0.0, 0.3, 0.4, 0.0, 0.0]).log().expand(1000, -1)
    noise = torch.full((1000,), u, dtype=torch.float64)
    assert set(choose(logprobs, noise, 1.0).tolist()) == {{0.0: 1, 0.5: 3}.get(u, 4)}
    # the rising sums of a nucleus too
    assert set(choose(logprobs, noise, 0.39).tolist()) == {4}


def test_models_with_one_row_of_positions() -> None:
    torch.manual_seed(0)
    policy = text_policy(num_key_value_heads=2, initializer_range=0.2).eval()
    prompts = text_prompts(4, 9, 6)
    for sampling in (GREEDY, SAMPLED):
        assert decode(policy, prompts, sampling) == generate(policy, prompts, sampling)


def test_sliding_windows_are_refused() -> None:
    policy = text_policy(use_sliding_window=True, sliding_window=8, max_window_layers=1)
    with pytest.raises(ValueError, match="use_sliding_window"):
        decode(policy, text_prompts(4), GREEDY)


def text_policy(**options: Any) -> Policy:
    """A model without a vision part."""
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return Policy(Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=4, **options)), pad_token_id=0)


def text_prompts(*lengths: int) -> list[EncodedPrompt]:
    torch.manual_seed(1)
    prompt = Prompt("random", "random", [], [], Gold("1"))
    return [EncodedPrompt(prompt, torch.randint(12, 32, (n,)), torch.zeros(n, dtype=torch.long)) for n in lengths]


def test_logits_that_are_not_finite_are_an_error_with_a_reason() -> None:
    logprobs = torch.zeros(2, 5).log_softmax(-1)
    logprobs[1, 2] = float("nan")
    with pytest.raises(RuntimeError, match="logits are not finite: the training has diverged"):
        choose(logprobs, torch.tensor([0.5, 0.5], dtype=torch.float64), top_p=1.0)
