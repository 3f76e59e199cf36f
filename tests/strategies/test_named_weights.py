"""Streaming the weights of an FSDP2 policy: all of them, and no more than one at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from random_models import build_model

from observe_r1.loading import LoraOptions, PolicyOptions, load_policy, shard_policy
from observe_r1.peak_memory import PeakMemory
from observe_r1.policy import Policy

from .processes import on_two_ranks

LORA = LoraOptions(4, 8, ["q_proj", "down_proj"])


def load_with_adapters_that_do_something(options: PolicyOptions, dtype: torch.dtype, *, empty: bool = False) -> Policy:
    policy = load_policy(options, dtype, empty=empty)
    if not empty:
        generator = torch.Generator().manual_seed(0)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(generator=generator)
    return policy


def compare(mesh: dist.DeviceMesh, directory: str, lora: LoraOptions | None) -> None:
    options = PolicyOptions(directory, lora=lora)
    torch.manual_seed(0)
    policy = shard_policy(load_with_adapters_that_do_something, options, torch.float32, mesh)
    torch.manual_seed(0)
    plain = load_with_adapters_that_do_something(options, torch.float32)
    expected = dict(plain.named_weights())
    frequencies = dict(plain.named_buffers())
    count = 0
    for name, weight in policy.named_weights():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-6 if lora else 0)
        count += 1
    assert count == len(expected)
    for name, buffer in policy.named_buffers():
        assert torch.equal(buffer, frequencies[name])
    assert all(parameter.to_local().numel() < parameter.numel() for parameter in policy.parameters())  # type: ignore[attr-defined]


def compare_all(mesh: dist.DeviceMesh, directory: str, adapters: list[LoraOptions | None]) -> None:
    for lora in adapters:
        compare(mesh, directory, lora)


def measure(mesh: dist.DeviceMesh, directory: str) -> None:
    policy = shard_policy(load_policy, PolicyOptions(directory), torch.float32, mesh)
    sizes = [shape.numel() * dtype.itemsize for shape, dtype in policy.weight_shapes().values()]
    with PeakMemory("cpu") as memory:
        for name, weight in policy.named_weights():
            del name, weight
    extra, largest = memory.peak - memory.before, max(sizes)
    # gloo, not NCCL, keeps a copy of what it gathers
    part, full = torch.ones(largest // 8), torch.ones(largest // 4)
    with PeakMemory("cpu") as memory:
        dist.all_gather_into_tensor(full, part)
    copy = memory.peak - memory.before
    print(f"{extra / 2**20:.1f} MiB extra, {copy / 2**20:.1f} of them gloo's; largest weight {largest / 2**20:.1f}")
    assert extra - copy <= 1.5 * largest  # less than two
    assert sum(sizes) > 4 * largest


@pytest.mark.slow
def test_every_weight_comes_once_and_whole(tmp_path: Path) -> None:
    """Rotary frequencies, which no state dict has, are filled in too."""
    pytest.importorskip("peft")
    on_two_ranks(tmp_path, compare_all, "quickstart", [None, LORA])


@pytest.mark.slow
def test_a_weight_at_a_time_is_all_the_memory_it_takes(tmp_path: Path) -> None:
    if not PeakMemory.is_measured("cpu"):
        pytest.skip("this machine does not tell the peak")
    model = build_model(vocabulary=16_384, hidden=512, intermediate=2048, layers=8, tied=True)
    model.save_pretrained(tmp_path)
    on_two_ranks(tmp_path, measure, str(tmp_path))
