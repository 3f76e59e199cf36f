"""What every phase of a training takes on one device, part by part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from observe_r1.experience import EncodedPrompt, MicroBatch
from observe_r1.planning.devices import GIB, Device
from observe_r1.planning.options import Assumptions
from observe_r1.planning.rehearsal import GRADIENTS, OPTIMIZER, WEIGHTS, Counts, Parts, Rehearsal
from observe_r1.planning.setup import Setup
from observe_r1.quantization import packed_bytes
from observe_r1.rollout import HFRollout, VLLMLocalRollout
from observe_r1.rollout.vllm_options import CPU_CACHE_GIB

MASTER, REFERENCE, BUCKETS = "master weights", "reference model", "gradient buckets"
GATHERED, ENGINE, RESERVED, FRAGMENTED = "gathered weights", "vLLM", "CUDA, NCCL", "fragmentation"
STEP, UNPACKED = "optimizer step", "unpacked weights"
RESIDENT = (WEIGHTS, GRADIENTS, BUCKETS, OPTIMIZER, MASTER, REFERENCE)
"""Parts that are there in every phase."""

SAMPLING, OLD, REFERENCE_PASS, TRAINING, UPDATE = (
    *("sampling", "old log-probs", "reference log-probs"),
    *("forward and backward", "optimizer step"),
)
BLOCKS_GATHERED = 3
"""Blocks of weights that FSDP2 has whole at once: the one that runs, the next one, and the buffer it comes in.

Around an embedding or output layer it is the layer, its buffer, and a block.
"""

ZERO3_LIVE = 10**9
"""Parameters that DeepSpeed keeps whole at most: its default of `stage3_max_live_parameters`."""


@dataclass(frozen=True)
class Phase:
    """One phase of a rollout and what it takes at its peak, in bytes by part."""

    name: str
    parts: Parts

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class MemoryPlan:
    """What every phase takes on one device.

    Args:
        batch: The micro-batch that training was planned with.
        host: Bytes that one rank takes of the CPU's memory for what is offloaded.
    """

    phases: list[Phase]
    counts: Counts
    batch: MicroBatch
    available: int
    host: int

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def fits(self) -> bool:
        return self.peak.total <= self.available


def plan_memory(
    setup: Setup,
    rehearsal: Rehearsal,
    prompt: EncodedPrompt,
    length: int,
    device: Device,
    assumptions: Assumptions,
    said: Callable[[str], None] = lambda step: None,
) -> MemoryPlan:
    """Rehearses every phase and adds what the strategy holds and gathers.

    Args:
        length: Of the longest completion.
        said: Told what is rehearsed next.
    """
    on_gpu, counts = device.kind == "cuda", rehearsal.counts
    said(UPDATE)
    kept, step = _optimizer(setup, rehearsal, on_gpu)
    resident, host = _resident(setup, counts, kept)
    said(TRAINING)
    batch, training = rehearsal.training(prompt, length)
    said(SAMPLING)
    phases = [Phase(SAMPLING, _sampling(setup, rehearsal, prompt, length, device))]
    forward = _gathered(setup, counts) | _unpacked(setup, counts)
    has_old = setup.updates.steps_per_rollout * setup.updates.epochs_per_rollout > 1
    for name, wanted in ((OLD, has_old), (REFERENCE_PASS, setup.has_reference)):
        if wanted:
            said(name)
            found = rehearsal.logprobs(batch, name == REFERENCE_PASS and setup.reference_model)
            offloaded = _fetched_reference(setup, counts) if name == REFERENCE_PASS else {}
            phases.append(Phase(name, {**found, **forward, **offloaded}))
    gathered = _gathered_in_backward(setup, counts) | _unpacked(setup, counts)
    phases.append(Phase(TRAINING, {**training, **gathered}))
    phases.append(Phase(UPDATE, {STEP: step + _reduced_last(setup, counts)}))
    return MemoryPlan(
        [_complete(phase, resident, on_gpu, assumptions) for phase in phases], counts, batch, device.memory, host
    )


def _complete(phase: Phase, resident: Parts, on_gpu: bool, assumptions: Assumptions) -> Phase:
    parts = {**resident, **phase.parts}
    if on_gpu:
        # vLLM takes its share at once
        moving = sum(size for name, size in phase.parts.items() if name != ENGINE)
        parts[FRAGMENTED] = int(assumptions.fragmentation * moving)
        parts[RESERVED] = int(assumptions.reserved_gib * GIB)
    return Phase(phase.name, {name: size for name, size in parts.items() if size})


def _optimizer(setup: Setup, rehearsal: Rehearsal, on_gpu: bool) -> tuple[int, int]:
    """Bytes the optimizer keeps on this rank, and those its step takes beside them."""
    spread, counts = setup.spread, rehearsal.counts
    if not spread.is_zero:
        given = rehearsal.shards(setup.dtype) if spread.kind == "fsdp2" else None
        return rehearsal.optimizer(given, on_gpu)
    kept, step = rehearsal.optimizer(rehearsal.flat(torch.float32), on_gpu)
    gradients = 4 * -(-counts.trained // spread.parts)  # as float32, for the step
    return kept, 0 if spread.offload_optimizer else step + gradients


def _resident(setup: Setup, counts: Counts, kept: int) -> tuple[Parts, int]:
    """What is there in every phase, by part, and what of it is in the CPU's memory instead."""
    spread, parts = setup.spread, setup.spread.parts
    size, compute = setup.dtype.itemsize, setup.compute_dtype.itemsize

    def share(parameters: int, of: int, width: int) -> int:
        return -(-parameters // of) * width

    reference = counts.total if setup.reference_model else 0
    reference_size = _reference_size(setup, counts.total, counts.cast) if setup.reference_model else 0
    far = setup.reference_offload != "none"
    if spread.kind in ("single", "ddp"):
        packed = counts.quantized if setup.policy.quantization is not None else 0
        return {
            WEIGHTS: (counts.total - packed) * size + packed_bytes(packed),
            GRADIENTS: counts.trained * size,
            BUCKETS: counts.trained * size if spread.copies_gradients else 0,
            OPTIMIZER: kept,
            REFERENCE: 0 if far else reference_size,
        }, reference_size if far else 0
    if spread.kind == "fsdp2":
        return {
            WEIGHTS: share(counts.total, parts, size),
            GRADIENTS: share(counts.trained, parts, size),
            OPTIMIZER: kept,
            REFERENCE: share(reference, parts, compute),
        }, 0
    whole = spread.kind != "zero3"
    on_device: Parts = {
        WEIGHTS: share(counts.total, 1 if whole else parts, compute),
        GRADIENTS: share(counts.trained, 1 if spread.kind == "zero1" else parts, compute),
        OPTIMIZER: kept,
        MASTER: share(counts.trained, parts, 4),
        REFERENCE: reference_size if whole else share(reference, parts, compute),
    }
    offloaded = [OPTIMIZER, MASTER, GRADIENTS] if spread.offload_optimizer else []
    offloaded += [WEIGHTS, REFERENCE] if spread.offload_parameters and not whole else []
    offloaded += [REFERENCE] if far and whole else []
    host = sum(on_device.pop(name) for name in offloaded)
    return {**on_device, BUCKETS: spread.reduce_bucket * spread.buckets * compute}, host


def _unpacked(setup: Setup, counts: Counts) -> Parts:
    """Weights in 4 bits are multiplied in the dtype that is computed with, a layer at a time."""
    if setup.policy.quantization is None:
        return {}
    return {UNPACKED: counts.largest_quantized * setup.compute_dtype.itemsize}


def _fetched_reference(setup: Setup, counts: Counts) -> Parts:
    """What its passes have on the device of a reference model that is offloaded otherwise."""
    if setup.reference_offload == "none" or not setup.reference_model:
        return {}
    if setup.reference_offload == "model":
        return {REFERENCE: _reference_size(setup, counts.total, counts.cast)}
    fetched = counts.rest + counts.largest_block
    return {REFERENCE: _reference_size(setup, fetched, counts.cast_rest + counts.cast_in_block)}


def _reference_size(setup: Setup, parameters: int, cast: int) -> int:
    """Bytes of so many parameters of a whole reference model, of which autocast would cast so many."""
    kept = setup.compute_dtype.itemsize
    return parameters * kept if setup.spread.is_zero else cast * kept + (parameters - cast) * setup.dtype.itemsize


def _gathered(setup: Setup, counts: Counts) -> Parts:
    """Weights that a forward has whole, of a strategy that spreads them."""
    width = setup.compute_dtype.itemsize
    if setup.spread.kind == "fsdp2":
        moving = max(BLOCKS_GATHERED * counts.largest_block, 2 * counts.vocabulary_layer + counts.largest_block)
        return {GATHERED: width * min(counts.total, counts.root + moving)}
    if setup.spread.kind == "zero3":
        return {GATHERED: width * min(counts.total, ZERO3_LIVE)}
    return {}


def _gathered_in_backward(setup: Setup, counts: Counts) -> Parts:
    """The same, and gradients that have not been reduced yet: of a block or an output layer, and of what is in none."""
    found = _gathered(setup, counts)
    if setup.spread.kind == "fsdp2":
        width, reduced = setup.compute_dtype.itemsize, setup.dtype.itemsize
        block, layer = counts.trained_in_block, counts.trained_in_vocabulary_layer
        # those of a block beside what came before it and is on its way, or of the output layer, which comes first
        moving = max(block * (width + reduced) + max(block, layer) * reduced, layer * (width + reduced))
        found[GATHERED] += moving + counts.trained_root * width
    return found


def _reduced_last(setup: Setup, counts: Counts) -> int:
    """What FSDP2 reduces at the end of a backward, when no activation is left: the embedding and all in no block."""
    if setup.spread.kind != "fsdp2":
        return 0
    width, reduced = setup.compute_dtype.itemsize, setup.dtype.itemsize
    trained = counts.trained_root + counts.trained_in_vocabulary_layer
    return (counts.root + 2 * counts.vocabulary_layer) * width + trained * (width + reduced)


def _sampling(setup: Setup, rehearsal: Rehearsal, prompt: EncodedPrompt, length: int, device: Device) -> Parts:
    engine: Any = setup.engine
    if isinstance(engine, VLLMLocalRollout):
        if device.kind == "cuda":
            return {ENGINE: int(engine.options.gpu_memory_utilization * device.memory)}
        cache = engine.options.cache_gib or CPU_CACHE_GIB
        return {ENGINE: rehearsal.counts.total * setup.compute_dtype.itemsize + int(cache * GIB)}
    if not isinstance(engine, HFRollout):
        return {}
    gathered = _gathered(setup, rehearsal.counts)
    if setup.spread.kind == "fsdp2" and engine.keep_weights_whole:
        gathered = {GATHERED: rehearsal.counts.total * setup.compute_dtype.itemsize}
    return {**rehearsal.sampling(prompt, length), **gathered, **_unpacked(setup, rehearsal.counts)}
