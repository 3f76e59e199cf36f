"""Token equivalents against the FLOPs that PyTorch counts in real models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from random_models import FAMILIES, build_model, random_prompt
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from observe_r1.experience import EncodedPrompt
from observe_r1.loading import PolicyOptions, load_policy
from observe_r1.token_cost import TokenCost


@pytest.fixture(scope="module", params=FAMILIES)
def counted(request: pytest.FixtureRequest) -> tuple[Any, EncodedPrompt, dict[str, int]]:
    """A model, a prompt with images of 64 and 32 patches, and the FLOPs of its forward by name of the module."""
    model = build_model(request.param, vocabulary=200, hidden=64, heads=4, key_value_heads=2, layers=3, vision_layers=3)
    model.set_attn_implementation("eager")
    prompt = random_prompt(model, 20, [(8, 8), (4, 8)], torch.Generator().manual_seed(0))
    assert prompt.vision is not None
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(
            input_ids=prompt.token_ids[None],
            mm_token_type_ids=prompt.mm_token_type_ids[None],
            pixel_values=prompt.vision.pixel_values,
            image_grid_thw=prompt.vision.image_grid_thw,
        )
    flops = {name.partition(".")[2]: sum(by_op.values()) for name, by_op in counter.get_flop_counts().items()}
    return model, prompt, flops


def unit_of(model: Any) -> int:
    """FLOPs of one token equivalent, counted in the weights that are there."""
    layers = model.model.language_model.layers
    return 2 * sum(module.weight.numel() for module in layers.modules() if isinstance(module, nn.Linear))


def test_coefficients_are_those_of_the_flops_that_pytorch_counts(
    counted: tuple[Any, EncodedPrompt, dict[str, int]],
) -> None:
    model, prompt, flops = counted
    cost, unit, tokens = TokenCost.of(model.config), unit_of(model), prompt.token_ids.numel()
    text = sum(flops[f"model.language_model.layers.{layer}"] for layer in range(3))
    tower = sum(flops[f"model.visual.blocks.{layer}"] for layer in range(3))
    # eager attention multiplies the masked half too
    assert unit * (tokens + cost.attention * tokens**2) == pytest.approx(text, rel=1e-9)
    assert unit * cost.head * tokens == pytest.approx(flops["lm_head"], rel=1e-9)
    images = cost.vision * (64 + 32) + cost.vision_attention * (64**2 + 32**2)
    assert unit * images == pytest.approx(tower, rel=1e-9)
    assert cost.prompt(tokens, [64, 32]) - cost.prompt(tokens) == pytest.approx(images)


def test_a_prompt_and_its_completions_attend_to_what_a_causal_mask_shows() -> None:
    prompt, lengths = 300, [200, 150]
    cost = TokenCost(attention=0.01, head=0.5)
    group = cost.group(prompt, [], lengths)
    pairs = [torch.ones(prompt + length, prompt + length).tril()[prompt:].sum().item() for length in lengths]
    assert group.completions == pytest.approx(
        [1.5 * length + 0.01 * count for length, count in zip(lengths, pairs, strict=True)], rel=0.002
    )
    assert group.prompt == pytest.approx(prompt + 0.01 * torch.ones(prompt, prompt).tril().sum().item(), rel=0.005)


def test_repeated_prompts_are_paid_by_every_completion() -> None:
    shared = TokenCost(0.01, 0.1, 0.2, 0.001).group(50, [16], [10, 20])
    repeated = TokenCost(0.01, 0.1, 0.2, 0.001, repeated_prompts=True).group(50, [16], [10, 20])
    assert repeated.prompt == 0
    assert repeated.completions == pytest.approx([shared.prompt + cost for cost in shared.completions])


def test_a_tower_that_is_not_trained_costs_nothing() -> None:
    config = build_model().config
    trained, frozen = TokenCost.of(config), TokenCost.of(config, vision=False)
    assert frozen.prompt(40, [64]) == trained.prompt(40) < trained.prompt(40, [64])
    text_model = TokenCost.of(config.get_text_config(), repeated_prompts=True)
    assert (text_model.attention, text_model.head) == (trained.attention, trained.head)
    assert text_model.vision == text_model.vision_attention == 0
    assert text_model.repeated_prompts


def test_a_policy_knows_what_it_trains_and_whether_it_shares_prompts() -> None:
    trained = load_policy(PolicyOptions("quickstart")).token_cost()
    assert trained.vision > 0
    assert not trained.repeated_prompts
    frozen = load_policy(PolicyOptions("quickstart", forward="padded", freeze=["*visual*"])).token_cost()
    assert frozen.vision == frozen.vision_attention == 0
    assert frozen.repeated_prompts
