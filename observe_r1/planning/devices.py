"""Devices by name: memory, arithmetic and bandwidth as their makers publish them, and of this CPU as measured."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace
from typing import Literal

import torch

from observe_r1.peak_memory import PeakMemory

GB, MIB, GIB, TERA = 10**9, 2**20, 2**30, 10**12


@dataclass(frozen=True)
class Device:
    """What one device has.

    Args:
        memory: Bytes.
        half_flops: Dense bfloat16 operations with float32 sums, per second.
        full_flops: float32 operations per second, as torch computes by default (no TF32).
        bandwidth: Bytes per second from and to its memory.
    """

    name: str
    kind: Literal["cuda", "cpu"]
    memory: int
    half_flops: float
    full_flops: float
    bandwidth: float


def _gpu(name: str, gib: float, half: float, full: float, gb_per_second: float) -> Device:
    return Device(name, "cuda", int(gib * GIB), half * TERA, full * TERA, gb_per_second * GB)


# data sheets, without sparsity; memory is what the driver reports, a little below the name
DEVICES = {
    device.name: device
    for device in (
        _gpu("a100-40gb", 39.4, 312, 19.5, 1555),
        _gpu("a100-80gb", 79.1, 312, 19.5, 2039),
        _gpu("h100", 79.1, 989, 67, 3350),
        _gpu("h200", 139.8, 989, 67, 4800),
        _gpu("b200", 178.3, 2250, 75, 7700),
        _gpu("l40s", 44.4, 362, 91.6, 864),
        _gpu("a10", 22.1, 125, 31.2, 600),
        _gpu("l4", 22.1, 121, 30.3, 300),
        _gpu("rtx-6000-ada", 47.4, 364, 91.1, 960),
        _gpu("rtx-4090", 23.6, 165, 82.6, 1008),
        _gpu("rtx-3090", 23.6, 71, 35.6, 936),
    )
}


def find_device(name: str, memory_gb: float | None = None) -> Device:
    """The device of this name, with another memory if one is given.

    Args:
        name: A name of `DEVICES`, or `cpu` for this machine's, whose speed is measured.
        memory_gb: Gigabytes as on the label: 80 for a GPU of 80 GB, counted as GiB less what its driver keeps.

    Raises:
        ValueError: There is no such device.
    """
    device = this_cpu() if name == "cpu" else DEVICES.get(name.lower().replace("_", "-").replace(" ", "-"))
    if device is None:
        raise ValueError(
            f"plan.device is {name!r}. Choose one of {', '.join([*DEVICES, 'cpu'])}; for others, the one that is most "
            "like it and --plan.device_memory_gb."
        )
    if memory_gb is None:
        return device
    if memory_gb <= 0:
        raise ValueError(f"plan.device_memory_gb is {memory_gb}, but it must be positive.")
    usable = 1.0 if device.kind == "cpu" else 0.988
    return Device(
        device.name,
        device.kind,
        int(memory_gb * GIB * usable),
        device.half_flops,
        device.full_flops,
        device.bandwidth,
    )


def this_gpu() -> Device | None:
    """The GPU of this machine, with the memory it has; None where there is none.

    Raises:
        ValueError: Its speed is not listed.
    """
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return listed_gpu(properties.name, properties.total_memory)


def listed_gpu(name: str, memory: int) -> Device:
    """The GPU that calls itself `name`, with `memory` bytes; see `this_gpu`."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    fitting = [device for device in DEVICES.values() if _is_called(device.name, words)]
    if not fitting:
        raise ValueError(
            f"This machine's GPU is {name}, which is not listed: give --plan.device, the one of {', '.join(DEVICES)} "
            f"that is most like it, and --plan.device_memory_gb {memory / 1e9:.0f}."
        )
    closest = min(fitting, key=lambda device: abs(device.memory - memory))
    return replace(closest, memory=memory)


def _is_called(listed: str, words: list[str]) -> bool:
    """All parts of the listed name in their order, as whole words; its memory aside."""
    parts = [part for part in listed.split("-") if not part.endswith("gb")]
    return any(words[start : start + len(parts)] == parts for start in range(len(words)))


def this_cpu() -> Device:
    """This machine's CPU, by a product of matrices and a copy of half a second each."""
    rates = {dtype: _matmul_flops(dtype) for dtype in (torch.bfloat16, torch.float32)}
    return Device(
        "cpu",
        "cpu",
        PeakMemory("cpu").available,
        rates[torch.bfloat16],
        rates[torch.float32],
        _copy_bandwidth(),
    )


def _matmul_flops(dtype: torch.dtype, size: int = 768) -> float:
    left, right = (torch.ones(size, size, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: left @ right)


def _copy_bandwidth(size: int = 64 * 2**20) -> float:
    source, target = (torch.ones(size, dtype=torch.uint8) for _ in range(2))
    return 2 * size / _seconds(lambda: target.copy_(source))


def _seconds(work: object, budget: float = 0.25) -> float:
    """Of the fastest of as many calls as fit."""
    assert callable(work)
    work()
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < budget:
        before = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - before)
    return best
