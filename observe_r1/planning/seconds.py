"""How long the phases of a rollout take: operations and bytes over what a device reaches of its peak. An estimate."""

from __future__ import annotations

import math
from dataclasses import dataclass

from observe_r1.balancing import cost_of
from observe_r1.experience import EncodedPrompt
from observe_r1.fitting import made_up_groups
from observe_r1.micro_batches import deal_steps
from observe_r1.planning.devices import GIB, Device
from observe_r1.planning.memory import OLD, REFERENCE_PASS, SAMPLING
from observe_r1.planning.options import Assumptions
from observe_r1.planning.rehearsal import Counts
from observe_r1.planning.setup import Setup
from observe_r1.policy import Policy
from observe_r1.rollout import HFRollout, VLLMLocalRollout, VLLMServerRollout
from observe_r1.token_cost import GroupCost, TokenCost, token_flops

TRAIN = "training"
VLLM_BESIDE_CACHE = 2 * GIB  # activations and graphs
EULER = 0.5772
SERVER_SHARE = 0.9
"""Of a server's GPU that vLLM takes, where it has one to itself."""


@dataclass(frozen=True)
class TimePlan:
    """Seconds of each phase of a rollout with all its optimizer steps, on every rank at the same time.

    Args:
        samples_ahead: Sampling and training run beside each other.
        warnings: What makes it slower than that, and is not counted.
    """

    phases: dict[str, float]
    mean_tokens: int
    samples_ahead: bool
    warnings: list[str]

    @property
    def total(self) -> float:
        sampling = self.phases[SAMPLING]
        rest = sum(self.phases.values()) - sampling
        return max(sampling, rest) if self.samples_ahead else sampling + rest


def plan_seconds(
    setup: Setup,
    policy: Policy,
    counts: Counts,
    prompt: EncodedPrompt,
    lengths: tuple[int, int],
    device: Device,
    assumptions: Assumptions,
) -> TimePlan:
    """Args: as of `plan_memory`; `lengths` are the mean and the longest of completions, in tokens."""
    mean, _ = lengths
    flops, distinct = _forward_flops(setup, policy, prompt, mean), setup.updates.steps_per_rollout
    peak = device.full_flops if setup.compute_dtype.itemsize == 4 else device.half_flops
    # forward, again where nothing is kept, gradients of activations, and of the weights that are trained
    passes = 2 + setup.policy.gradient_checkpointing + counts.trained / counts.total
    epochs = setup.updates.epochs_per_rollout
    forward = flops / (peak * assumptions.forward_utilisation)
    phases = {SAMPLING: _sampling(setup, policy, counts, prompt, lengths, device, assumptions)}
    if distinct * epochs > 1:
        phases[OLD] = forward
    if setup.has_reference:
        phases[REFERENCE_PASS] = forward
    phases[TRAIN] = epochs * passes * flops / (peak * assumptions.training_utilisation)
    return TimePlan(phases, mean, bool(setup.engine.async_steps), _warnings(setup))


def _forward_flops(setup: Setup, policy: Policy, prompt: EncodedPrompt, length: int) -> float:
    """Of one forward over all micro-batches of a rank, dealt out as in training."""
    config, vision = policy.model.config, policy.trains_vision or policy.in_lockstep
    cost = TokenCost.of(config, vision=vision, repeated_prompts=not policy.shares_prefixes)
    size = setup.sampling.group_size
    groups = made_up_groups(policy, prompt, prompts=setup.prompts_per_rank, group_size=size, length=length)
    steps = deal_steps(
        groups,
        steps=setup.updates.steps_per_rollout,
        epochs=1,
        micro_batches=setup.micro_batches,
        skip_zero_advantage=False,
        cost=cost,
    )
    of_group: GroupCost = cost.group(prompt.token_ids.numel(), prompt.tower_patches, [length] * size)
    costs = [of_group] * len(groups)
    items = [[(g, c) for g, chosen in batch for c in chosen] for step in steps for batch in step.micro_batches]
    return token_flops(config) * sum(cost_of(costs, batch) for batch in items)


def _sampling(
    setup: Setup,
    policy: Policy,
    counts: Counts,
    prompt: EncodedPrompt,
    lengths: tuple[int, int],
    device: Device,
    assumptions: Assumptions,
) -> float:
    """Reading the prompts, and decode steps that read weights and caches from memory."""
    mean, longest = lengths
    config = policy.model.config
    text = config.get_text_config()
    tokens, width, size = prompt.token_ids.numel(), setup.compute_dtype.itemsize, setup.sampling.group_size
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cached = 2 * text.num_hidden_layers * text.num_key_value_heads * head_size * width  # bytes of a token
    tower = sum(parameter.numel() for parameter in policy._vision_weights())
    weights = (counts.total - tower) * width
    rate = device.bandwidth * assumptions.bandwidth_utilisation
    peak = device.half_flops if width < 4 else device.full_flops
    read = token_flops(config) * TokenCost.of(config).prompt(tokens, prompt.tower_patches)
    read /= peak * assumptions.forward_utilisation
    if isinstance(setup.engine, HFRollout):
        seconds = setup.prompts_per_rank * read
        step = weights / rate + assumptions.seconds_per_layer_and_step * text.num_hidden_layers
        for batch in setup.engine.batches([prompt] * setup.prompts_per_rank, size):
            decoded = len(batch) * size
            steps = _longest_of(decoded, mean, longest)
            seconds += steps * step + cached * (len(batch) * tokens * steps + decoded * mean**2) / rate
        return float(seconds)
    engines, share = 1, 0.0
    prompts = setup.prompts_per_rank
    if isinstance(setup.engine, VLLMServerRollout):
        engines, share, prompts = len(setup.engine.urls), SERVER_SHARE, setup.prompts_per_rollout
    elif isinstance(setup.engine, VLLMLocalRollout):
        share = setup.engine.options.gpu_memory_utilization
    room = max(share * device.memory - counts.total * width - VLLM_BESIDE_CACHE, cached * (tokens + longest))
    sequences = prompts * size / engines
    at_once = max(min(sequences, assumptions.sequences_per_engine, room / (cached * (tokens / size + mean))), 1.0)
    steps = max(sequences * mean / at_once, _longest_of(at_once, mean, longest))
    step = assumptions.seconds_per_step_vllm + (weights + at_once * cached * (tokens / size + mean)) / rate
    return float(prompts / engines * read + steps * step)


def _longest_of(sequences: float, mean: int, longest: int) -> float:
    """Expected longest of so many completions whose lengths are spread exponentially."""
    return min(longest, mean * (math.log(max(sequences, 1.0)) + EULER))


def _warnings(setup: Setup) -> list[str]:
    """What is known to take time and is not counted."""
    spread, found = setup.spread, []
    if isinstance(setup.engine, HFRollout) and (
        spread.kind == "zero3" or (spread.kind == "fsdp2" and not setup.engine.keep_weights_whole)
    ):
        found.append("gathering all weights for every sampled token, which takes many times as long (use vLLM)")
    if spread.offload_optimizer or spread.offload_parameters:
        found.append("travel of what is offloaded, which can take longer than everything else")
    elif spread.ranks > 1:
        found.append("communication between ranks")
    if not isinstance(setup.engine, HFRollout):
        found.append("transfer of weights to vLLM")
    return found
