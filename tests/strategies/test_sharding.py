"""An FSDP2 policy whose embedding and output layer are two, as in Qwen2.5-VL-7B: each is gathered by itself."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from observe_r1.answers import Gold
from observe_r1.experience import EncodedPrompt, GroupSlice, Prompt
from observe_r1.loading import PolicyOptions, load_policy, locate, shard_policy
from observe_r1.sharding import gradient_norm, whole

from .processes import on_two_ranks


@pytest.fixture
def untied(tmp_path: Path) -> Path:
    """The tiny policy with an output layer of its own."""
    directory = tmp_path / "policy"
    shutil.copytree(locate("quickstart"), directory)
    config = json.loads((directory / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    (directory / "config.json").write_text(json.dumps(config))
    weights = load_file(directory / "model.safetensors")
    (embedding,) = (name for name in weights if name.endswith("embed_tokens.weight"))
    noise = torch.randn(weights[embedding].shape, generator=torch.Generator().manual_seed(0))
    weights["lm_head.weight"] = weights[embedding] + 0.1 * noise
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


def batch_of(rank: int) -> list[GroupSlice]:
    """A group without an image, other tokens and lengths on every rank."""
    numbers = torch.Generator().manual_seed(rank)
    prompt, *completions = (torch.randint(20, 260, (length + rank,), generator=numbers) for length in (9, 14, 3, 6))
    return [GroupSlice(EncodedPrompt(Prompt("", "", [], [], Gold("3")), prompt, prompt * 0), completions)]


def step(mesh: dist.DeviceMesh, directory: str) -> None:
    warnings.filterwarnings("error", message=".*returned a view tensor")
    options = PolicyOptions(directory, logprob_chunk_tokens=8)
    policy, plain = shard_policy(load_policy, options, torch.float32, mesh), load_policy(options)
    layers = policy.transformer.get_input_embeddings(), policy.transformer.get_output_embeddings()
    for _ in range(2):  # micro-batches
        found = policy(batch_of(dist.get_rank()), 0.9, with_entropy=True)
        assert all(isinstance(layer.weight, DTensor) for layer in layers)  # parts again, before the backward
        expected = [plain(batch_of(rank), 0.9, with_entropy=True) for rank in range(2)]
        torch.testing.assert_close(found.logprobs, expected[dist.get_rank()].logprobs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.entropy, expected[dist.get_rank()].entropy, rtol=1e-5, atol=1e-5)
        found.logprobs.sum().backward()
        (sum(output.logprobs.sum() for output in expected) / 2).backward()
    gradients = dict(plain.named_parameters())
    for name, parameter in policy.named_parameters():
        of_plain = gradients[name].grad
        torch.testing.assert_close(whole(parameter.grad), of_plain, rtol=1e-4, atol=1e-5 * float(of_plain.abs().max()))
    torch.testing.assert_close(gradient_norm(policy.parameters()), gradient_norm(plain.parameters()))
    with policy.kept_whole():
        assert not any(isinstance(layer.weight, DTensor) for layer in layers)
    for name, weight in policy.named_weights():
        assert torch.equal(weight, dict(plain.named_weights())[name])


@pytest.mark.slow
def test_embedding_and_output_layer_are_whole_only_while_they_run(untied: Path, tmp_path: Path) -> None:
    """With the log-probs and gradients of the plain model."""
    on_two_ranks(tmp_path, step, str(untied))
