"""The policy's forward: how often things run, what is kept, and what happens to models it does not fit."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import build_model, random_group

from observe_r1.experience import GroupSlice
from observe_r1.loading import PolicyOptions, load_policy
from observe_r1.policy import Policy
from observe_r1.shared_prefix import BACKENDS

from .conftest import naive_logprobs


def counted(model: Any) -> Counter[str]:
    """Patches through the vision tower and tokens through the text model, from now on."""
    counts: Counter[str] = Counter()
    model.model.visual.register_forward_pre_hook(lambda _, args: counts.update(patches=len(args[0])))
    model.model.language_model.layers[0].register_forward_pre_hook(
        lambda _, args: counts.update(tokens=args[0].shape[0] * args[0].shape[1])
    )
    return counts


def make_slices(model: Any, seed: int = 0) -> list[GroupSlice]:
    generator = torch.Generator().manual_seed(seed)
    return [
        random_group(model, 5, [(4, 6), (8, 4)], [3, 9, 1, 4], generator),
        random_group(model, 4, [(4, 4)], [6, 2, 2, 5], generator),
    ]


def test_each_prompt_and_image_passes_through_the_model_once() -> None:
    model = build_model()
    policy, slices = Policy(model, 0), make_slices(model)
    policy(slices, 1.0)  # with the self-check
    counts = counted(model)
    policy(slices, 1.0).logprobs.sum().backward()
    prompts = sum(len(part.prompt.token_ids) for part in slices)
    fed = sum(len(completion) - 1 for part in slices for completion in part.completions)
    assert counts == {"patches": 4 * 6 + 8 * 4 + 4 * 4, "tokens": prompts + fed}


def test_features_of_a_frozen_tower_are_computed_once_for_all_passes() -> None:
    model, reference_model = build_model(), build_model()
    for parameter in model.model.visual.parameters():
        parameter.requires_grad_(False)
    policy, reference = Policy(model, 0), Policy(reference_model, 0).requires_grad_(False)
    counts, of_reference = counted(model), counted(reference_model)
    slices = make_slices(model)
    prompts = policy.encode_images([part.prompt for part in slices])
    encoded = [GroupSlice(prompt, part.completions) for prompt, part in zip(prompts, slices, strict=True)]
    with torch.no_grad():
        old = policy(encoded, 1.0).logprobs
        fixed = reference(encoded, 1.0).logprobs
    trained = policy(encoded, 1.0).logprobs
    assert counts["patches"] == 4 * 6 + 8 * 4 + 4 * 4
    assert of_reference["patches"] == 0
    assert torch.equal(old, trained)  # to the last bit: the ratio of the first step is exactly 1
    assert torch.equal(old, fixed)
    # without the features, as after a resume, the tower runs again and nothing changes
    assert torch.equal(policy(slices, 1.0).logprobs, trained)
    assert policy.encode_images(prompts) == prompts
    # a tower that is trained has no features to keep
    policy.requires_grad_(True)
    assert policy.encode_images([part.prompt for part in slices])[0].vision is slices[0].prompt.vision


def test_a_model_with_sliding_windows_falls_back_with_a_warning() -> None:
    model = build_model()
    text = model.config.text_config
    text.use_sliding_window, text.sliding_window = True, 4
    text.layer_types = ["full_attention", "sliding_attention"]
    for number, layer in enumerate(model.model.language_model.layers):
        layer.self_attn.sliding_window = 4 if number else None
    model.model.language_model.has_sliding_layers = True
    policy, slices = Policy(model, 0), make_slices(model)
    with pytest.warns(UserWarning, match=r"does not fit Qwen2_5_VLForConditionalGeneration: .*sliding-window"):
        output = policy(slices, 1.0)
    assert not policy.shares_prefixes
    expected, _ = naive_logprobs(model, slices, 1.0, policy.forbidden_token_ids)
    torch.testing.assert_close(output.logprobs, expected, rtol=0, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy(slices, 1.0)  # told once


def test_a_model_that_disagrees_falls_back_with_a_warning() -> None:
    """Attention that ignores the layout, as a model with code of its own would."""
    model = build_model()
    policy, slices = Policy(model, 0), make_slices(model)
    for layer in model.model.language_model.layers:
        original = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, original=original, shared_prefix=None, **options: original(
            *args, **options
        )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    with pytest.warns(UserWarning, match=r"log-probs differ by [\d.]+ at most, where 0\.001 is allowed"):
        output = policy(slices, 1.0)
    expected, _ = naive_logprobs(model, slices, 1.0, policy.forbidden_token_ids)
    torch.testing.assert_close(output.logprobs, expected, rtol=0, atol=1e-5)


def test_the_check_passes_in_bfloat16() -> None:
    model = build_model().bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy = Policy(model, 0)
        policy(make_slices(model), 1.0)
    assert policy.shares_prefixes


@pytest.mark.parametrize("backend", ["sdpa", "two_pass", "varlen"])
def test_under_autocast_it_is_as_close_to_float32_as_the_plain_forward(backend: str) -> None:
    """Lightning's bf16-mixed."""
    model = build_model()
    slices = make_slices(model)
    policy, padded = Policy(model, 0, prefix_attention="auto"), Policy(model, 0, shares_prefixes=False)
    policy._backend = backend

    def run(forward: Policy) -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        logprobs = forward(slices, 1.0).logprobs
        logprobs.mean().backward()
        return logprobs.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    exact, exact_gradient = run(padded)
    with torch.autocast("cpu", torch.bfloat16):
        plain, plain_gradient = run(padded)
        found, gradient = run(policy)
    assert policy.shares_prefixes
    assert (found - exact).abs().max() <= 2 * (plain - exact).abs().max()
    assert (gradient - exact_gradient).norm() <= 2 * (plain_gradient - exact_gradient).norm()


@pytest.mark.parametrize("backend", ["varlen", "flash_attn"])
def test_a_backend_that_cannot_run_here_is_an_error(backend: str) -> None:
    model = build_model()
    message = rf"prefix_attention is {backend}, which needs CUDA.*cpu with torch.float32.*auto, two_pass, sdpa"
    with pytest.raises(ValueError, match=message):
        Policy(model, 0, prefix_attention=backend)(make_slices(model), 1.0)


def test_auto_tries_another_backend_before_it_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(BACKENDS, "two_pass", broken)
    model = build_model()
    policy = Policy(model, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy(make_slices(model), 1.0)
    assert policy.shares_prefixes


def test_running_out_of_memory_is_not_taken_for_a_misfit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model()
    policy = Policy(model, 0)

    def out_of_memory(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(policy, "_packed", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        policy(make_slices(model), 1.0)


def test_the_padded_forward_can_be_chosen_and_agrees(tmp_path: Path) -> None:
    build_model().save_pretrained(tmp_path)
    shared = load_policy(PolicyOptions(str(tmp_path)))
    padded = load_policy(PolicyOptions(str(tmp_path), forward="padded"))
    assert (shared.shares_prefixes, padded.shares_prefixes) == (True, False)
    slices = make_slices(shared.model)
    found, expected = shared(slices, 0.8, True), padded(slices, 0.8, True)
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.entropy, expected.entropy, rtol=0, atol=1e-5)


def test_the_export_does_not_name_our_attention(tmp_path: Path) -> None:
    policy = load_policy(PolicyOptions("quickstart"))
    policy.save_pretrained(tmp_path)
    assert "observe_r1" not in (tmp_path / "config.json").read_text()
