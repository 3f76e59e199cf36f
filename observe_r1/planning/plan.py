"""A plan: what a configured training takes on a device, whether it fits, and about how long a rollout lasts."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from observe_r1.fitting import advice
from observe_r1.planning.devices import Device, find_device
from observe_r1.planning.memory import SAMPLING, UPDATE, MemoryPlan, plan_memory
from observe_r1.planning.model_shapes import config_directory
from observe_r1.planning.options import PlanOptions
from observe_r1.planning.prompts import pixel_limits, planned_prompt
from observe_r1.planning.rehearsal import Rehearsal
from observe_r1.planning.seconds import TimePlan, plan_seconds
from observe_r1.planning.setup import Setup
from observe_r1.rollout import HFRollout, VLLMLocalRollout


@dataclass(frozen=True)
class Plan:
    """Everything that is known about a run before it starts.

    Args:
        prompt_tokens: Of the prompt it is made for, images included.
        image_tokens: Of these.
        completion_tokens: Of the longest completion.
    """

    setup: Setup
    options: PlanOptions
    device: Device
    memory: MemoryPlan
    seconds: TimePlan
    prompt_tokens: int
    image_tokens: int
    completion_tokens: int

    @property
    def exit_code(self) -> int:
        return 0 if self.memory.fits else 1

    @property
    def advice(self) -> list[str]:
        """What to change where it does not fit: what no smaller micro-batch can mend comes first."""
        if self.memory.fits:
            return []
        setup, engine = self.setup, self.setup.engine
        too_large = [phase.name for phase in self.memory.phases if phase.total > self.memory.available]
        found = []
        if UPDATE in too_large:
            found.append(
                "Weights and the optimizer's step are too much without any activation. Spread them over more devices "
                "(--config strategies/fsdp2.yaml), or train adapters (model.policy.lora)."
            )
        if SAMPLING in too_large and isinstance(engine, VLLMLocalRollout):
            found.append("For sampling: a smaller model.rollout.init_args.gpu_memory_utilization.")
        elif SAMPLING in too_large and isinstance(engine, HFRollout):
            found.append(
                "For sampling: a smaller model.rollout.init_args.sequences_per_batch (now "
                f"{engine.sequences_per_batch}) or model.sampling.max_new_tokens, or vLLM (--config "
                "rollout/vllm_server.yaml)."
            )
        if set(too_large) - {SAMPLING, UPDATE}:
            found.append(
                advice(setup.micro_batches, setup.policy.gradient_checkpointing, setup.sampling.max_new_tokens)
            )
        return found

    def as_json(self) -> dict[str, Any]:
        """For machines; bytes and seconds."""
        memory, seconds = self.memory, self.seconds
        return {
            "fits": memory.fits,
            "device": dataclasses.asdict(self.device),
            "ranks": self.setup.spread.ranks,
            "strategy": dataclasses.asdict(self.setup.spread),
            "precision": self.setup.precision,
            "parameters": dataclasses.asdict(memory.counts),
            "prompt_tokens": self.prompt_tokens,
            "image_tokens": self.image_tokens,
            "completion_tokens": self.completion_tokens,
            "micro_batch": {"prompts": len(memory.batch.slices), "completions": len(memory.batch.lengths)},
            "available_bytes": memory.available,
            "peak_bytes": memory.peak.total,
            "host_bytes_per_rank": memory.host,
            "phases": [{"name": phase.name, "bytes": phase.total, "parts": phase.parts} for phase in memory.phases],
            "seconds": {"phases": seconds.phases, "rollout": seconds.total, "mean_tokens": seconds.mean_tokens},
            "seconds_are": "estimated, measured by nobody on a GPU",
            "not_counted": seconds.warnings,
            "assumptions": dataclasses.asdict(self.options.assumptions),
            "advice": self.advice,
        }


def make_plan(
    setup: Setup, device: Device, options: PlanOptions, said: Callable[[str], None] = lambda step: None
) -> Plan:
    """Plans a run.

    Args:
        device: That every rank has one of.
        said: Told what is done next.

    Raises:
        ValueError: The model's config is nowhere, samples of this size would be skipped, or ranks cannot share prompts.
    """
    _ = setup.prompts_per_rank  # refused at once
    longest = options.completion_tokens or setup.sampling.max_new_tokens
    mean = min(options.mean_completion_tokens or 512, longest)
    with tempfile.TemporaryDirectory() as scratch:
        said("model")
        directory = config_directory(setup.policy.pretrained, Path(scratch))
        limits = pixel_limits(directory, setup.prompt)
        found = dataclasses.replace(setup, policy=dataclasses.replace(setup.policy, pretrained=directory))
        rehearsal = Rehearsal(found, device.kind == "cuda")
        config = rehearsal.policy.model.config
        prompt = planned_prompt(config, options, setup.prompt, limits, rehearsal.memory.empty)
        memory = plan_memory(found, rehearsal, prompt, longest, device, options.assumptions, said)
        said("seconds")
        seconds = plan_seconds(
            found, rehearsal.policy, rehearsal.counts, prompt, (mean, longest), device, options.assumptions
        )
    image_tokens = int(prompt.mm_token_type_ids.sum())
    return Plan(setup, options, device, memory, seconds, prompt.token_ids.numel(), image_tokens, longest)


def write_json(plan: Plan, path: str) -> None:
    """Writes the plan for machines."""
    Path(path).write_text(json.dumps(plan.as_json(), indent=1) + "\n")


def device_of(options: PlanOptions, accelerator: str, gpu: Callable[[], Device | None]) -> Device:
    """The device to plan for.

    Args:
        accelerator: Of the trainer.
        gpu: Finds this machine's; not asked where another device is named.
    """
    name = options.device or ("cpu" if accelerator == "cpu" else None)
    here = gpu() if name is None else None
    if here is not None and options.device_memory_gb is None:
        return here
    missing = "cpu" if accelerator == "auto" else "h100"
    return find_device(name or (missing if here is None else here.name), options.device_memory_gb)
