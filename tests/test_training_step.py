"""The gradient of an optimizer step on the real tiny model, against one plain forward over everything."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from observe_r1.encoding import PromptEncoder, PromptOptions
from observe_r1.experience import (
    Assignment,
    Completion,
    EncodedPrompt,
    Experience,
    GroupScores,
    GroupSlice,
    ImageFeatures,
    PromptGroup,
    Sealed,
    VisionInputs,
)
from observe_r1.ladder.reader import LadderDataset
from observe_r1.loading import PolicyOptions, load_policy, load_processor
from observe_r1.micro_batches import assemble, deal_steps
from observe_r1.module import ObserveR1
from observe_r1.objective import KLOptions, ObjectiveOptions
from observe_r1.policy import Policy
from observe_r1.token_cost import TokenCost

OPTIONS = PolicyOptions("quickstart", gradient_checkpointing=False, logprob_chunk_tokens=37)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy(OPTIONS)


@pytest.fixture(scope="module")
def prompts(tiny_ladder: Path) -> list[EncodedPrompt]:
    encoder = PromptEncoder(load_processor("quickstart", PromptOptions()), PromptOptions(system_prompt=None))
    ladder = LadderDataset(tiny_ladder)
    encoded = [encoder.encode(ladder[position]) for position in range(4)]  # type: ignore[arg-type]
    return [prompt for prompt in encoded if isinstance(prompt, EncodedPrompt)]


def make_groups(policy: Policy, prompts: Sequence[EncodedPrompt], seed: int, size: int = 3) -> list[PromptGroup]:
    """Groups with random completions and scores, ragged and partly left out; old log-probs near those of the policy."""
    generator = torch.Generator().manual_seed(seed)

    def completion() -> Completion:
        length = int(torch.randint(1, 14, (), generator=generator))
        tokens = torch.randint(20, 260, (length,), generator=generator)
        return Completion(tokens, -torch.rand(length, generator=generator), "")

    groups = []
    for prompt in prompts:
        completions = [completion() for _ in range(size)]
        advantage = torch.randn(size, generator=generator)
        advantage[int(torch.randint(0, size, (), generator=generator))] = 0.0
        trained = torch.rand(size, generator=generator) < 0.8
        nothing = torch.zeros(size, dtype=torch.bool)
        scores = GroupScores({}, torch.zeros(size), nothing, ~nothing, trained, advantage, 1.0)
        with torch.no_grad():
            now = policy([GroupSlice(prompt, [c.token_ids for c in completions])], 1.0).logprobs
        old = (now + 0.3 * torch.randn(len(now), generator=generator)).split([len(c) for c in completions])
        reference = [values - 0.1 for values in old]
        groups.append(PromptGroup(prompt, completions, scores, list(old), reference))
    return groups


def module_of(policy: Policy, micro_batches: int, **options: Any) -> ObserveR1:
    module = ObserveR1(OPTIONS, **options)
    module.policy = policy
    strategy = SimpleNamespace(handles_gradient_accumulation=False)
    trainer = SimpleNamespace(accumulate_grad_batches=micro_batches, world_size=1, strategy=strategy)
    module._trainer = trainer  # type: ignore[assignment]
    module.log_dict = lambda *_, **__: None  # type: ignore[method-assign,assignment]
    return module


def accumulated_gradient(
    policy: Policy, groups: list[PromptGroup], micro_batches: int, **options: Any
) -> tuple[Tensor, Experience]:
    """Gradient of the first optimizer step as Lightning accumulates it: each loss divided by the micro-batches."""
    module = module_of(policy, micro_batches, **options)
    steps = deal_steps(
        groups,
        steps=1,
        epochs=1,
        micro_batches=micro_batches,
        skip_zero_advantage=module.kl.coefficient == 0,
        cost=policy.token_cost(),
    )
    experience = Experience(groups, steps)
    policy.zero_grad()
    for number in range(micro_batches):
        loss = module.training_step(Sealed(assemble(experience, number)), number)
        (loss / micro_batches).backward()
    return flat_gradient(policy), experience


def flat_gradient(policy: Policy) -> Tensor:
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def plain_logprobs(policy: Policy, prompt: EncodedPrompt, completion: Tensor) -> Tensor:
    """One completion through the stock model: no padding, no chunks, full logits."""
    assert prompt.vision is not None
    ids = torch.cat([prompt.token_ids, completion])[None]
    types = torch.nn.functional.pad(prompt.mm_token_type_ids, (0, len(completion)))[None]
    logits = policy.model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=types,
        pixel_values=prompt.vision.pixel_values,
        image_grid_thw=prompt.vision.image_grid_thw,
    ).logits[0, -len(completion) - 1 : -1]
    logits[:, list(policy.forbidden_token_ids)] = -torch.inf
    return logits.log_softmax(-1).gather(1, completion[:, None])[:, 0]


def plain_gradient(policy: Policy, groups: list[PromptGroup], kl: float) -> Tensor:
    """Gradient of the token-mean clipped loss with a k3 term, written down once more for a whole step."""
    policy.zero_grad()
    terms, tokens = [], 0
    for group in groups:
        assert group.scores is not None
        assert group.old_logprobs is not None
        assert group.reference_logprobs is not None
        for number, completion in enumerate(group.completions):
            if not group.scores.trained[number]:
                continue
            new = plain_logprobs(policy, group.prompt, completion.token_ids)
            ratio, advantage = (new - group.old_logprobs[number]).exp(), group.scores.advantage[number]
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            difference = group.reference_logprobs[number] - new
            terms.append((-surrogate + kl * (difference.exp() - 1 - difference)).sum())
            tokens += len(completion)
    (torch.stack(terms).sum() / tokens).backward()
    return flat_gradient(policy)


@pytest.mark.parametrize("kl", [0.0, 0.1])
@pytest.mark.parametrize("seed", [0, 1])
def test_gradient_of_a_step_is_that_of_the_plain_loss(
    policy: Policy, prompts: list[EncodedPrompt], seed: int, kl: float
) -> None:
    groups = make_groups(policy, prompts, seed)
    options = KLOptions(kl, "loss", "k3")
    ours, _ = accumulated_gradient(policy, groups, 3, kl=options)
    theirs = plain_gradient(policy, groups, kl)
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "gspo", "cispo"])
@settings(max_examples=6)
@given(seed=st.integers(0, 1000), micro_batches=st.integers(2, 6))
def test_accumulated_gradient_equals_the_whole_batch(
    policy: Policy, prompts: list[EncodedPrompt], name: Any, seed: int, micro_batches: int
) -> None:
    """Any number of micro-batches; KL in the reward, so every completion has a gradient."""
    from observe_r1.advantages import AdvantageOptions

    groups = make_groups(policy, prompts, seed)
    options = {
        "objective": ObjectiveOptions(name, constant_length=16),
        "kl": KLOptions(0.05, "reward", "k1"),
        "advantage": AdvantageOptions(scale="none"),
    }
    whole, _ = accumulated_gradient(policy, groups, 1, **options)
    split, experience = accumulated_gradient(policy, groups, micro_batches, **options)
    assert len(experience) == micro_batches
    assert (split - whole).norm() <= 2e-5 * whole.norm()


def test_more_micro_batches_than_completions_to_train_are_filled_without_effect(
    policy: Policy, prompts: list[EncodedPrompt]
) -> None:
    groups = make_groups(policy, prompts[:1], seed=1, size=4)
    assert groups[0].scores is not None
    groups[0].scores.trained = torch.tensor([True, False, False, False])
    groups[0].scores.advantage = torch.tensor([1.0, 2.0, 2.0, 2.0])
    whole, _ = accumulated_gradient(policy, groups, 1)
    filled, experience = accumulated_gradient(policy, groups, 4)
    assert experience.steps[0].fillers == {1, 2, 3}
    assert (filled - whole).norm() <= 2e-5 * whole.norm()


def test_images_count_where_the_vision_tower_runs(policy: Policy, prompts: list[EncodedPrompt]) -> None:
    groups = make_groups(policy, prompts[:3], seed=2)
    for group in groups:
        assert group.scores is not None
        group.scores.trained[:] = True

    def dealt(vision: VisionInputs | None) -> list[Assignment]:
        """With these images in the prompt of the middle group and none in the others."""
        for number, group in enumerate(groups):
            group.prompt = dataclasses.replace(group.prompt, vision=vision if number == 1 else None)
        cost = TokenCost(vision=1000.0)
        steps = deal_steps(groups, steps=1, epochs=1, micro_batches=2, skip_zero_advantage=False, cost=cost)
        return steps[0].micro_batches

    images = groups[1].prompt.vision
    assert images is not None
    everything = [0, 1, 2]
    assert dealt(images) == [[(1, everything)], [(0, everything), (2, everything)]]
    kept = dataclasses.replace(images, features=ImageFeatures([], []))
    assert dealt(kept) == dealt(None) != dealt(images)


def test_rotary_frequencies_stay_float32() -> None:
    policy = load_policy(OPTIONS).to(torch.bfloat16)
    frequencies = [buffer for name, buffer in policy.named_buffers() if "inv_freq" in name]
    assert frequencies
    assert all(buffer.dtype == torch.float32 for buffer in frequencies)
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.bfloat16}
