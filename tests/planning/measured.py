"""Runs of which the planner's figures are compared with what the process took; `python measured.py CASE` measures one.

Each is measured in a process of its own: a test process has freed memory of its own to fill up first.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from random_models import build_model

from observe_r1.collection import UpdateOptions
from observe_r1.encoding import PromptOptions
from observe_r1.experience import EncodedPrompt
from observe_r1.fitting import dearest, forward_and_backward
from observe_r1.loading import LoraOptions, PolicyOptions, load_policy, load_reference
from observe_r1.parameter_groups import parameter_groups
from observe_r1.peak_memory import PeakMemory
from observe_r1.planning.options import PlanOptions
from observe_r1.planning.prompts import pixel_limits, planned_prompt
from observe_r1.planning.setup import Setup
from observe_r1.policy import Policy
from observe_r1.rollout import HFRollout, SamplingOptions

LARGER = {
    "vocabulary": 32_000,
    "hidden": 1024,
    "intermediate": 4096,
    "layers": 20,
    "heads": 16,
    "key_value_heads": 4,
    "vision_hidden": 768,
    "vision_intermediate": 2048,
    "vision_layers": 6,
    "vision_heads": 12,
    "window_size": 112,
    "tied": True,
}


@dataclass(frozen=True)
class Case:
    """A run of one rank on the CPU."""

    setup: Setup
    plan: PlanOptions
    model: dict[str, Any] | None = None  # of a random one; None: as `setup` says


def _setup(policy: PolicyOptions, **changes: Any) -> Setup:
    usual: dict[str, Any] = {
        "prompt": PromptOptions(None, 4096, 28 * 28, 448 * 448),
        "sampling": SamplingOptions(group_size=4, max_new_tokens=64),
        "updates": UpdateOptions(),
        "engine": HFRollout(),
        "optimizer": partial(torch.optim.AdamW, lr=1e-5),
        "dtype": torch.float32,
        "compute_dtype": torch.float32,
        "precision": "32-true",
        "has_reference": False,
        "prompts_per_rollout": 2,
    }
    return Setup(policy, **{**usual, **changes})


TINY = PolicyOptions("quickstart", gradient_checkpointing=False)
HALF = {"dtype": torch.bfloat16, "compute_dtype": torch.bfloat16, "precision": "bf16-true"}
MIXED = {"compute_dtype": torch.bfloat16, "precision": "bf16-mixed"}
MANY = {"sampling": SamplingOptions(8, max_new_tokens=160), "prompts_per_rollout": 8, "has_reference": True}
CASES = {
    "tiny": Case(_setup(TINY, **MANY), PlanOptions(text_tokens=200, image_pixels=224**2)),
    "tiny, padded, mixed": Case(
        _setup(dataclasses.replace(TINY, forward="padded", freeze=["*visual*"]), **{**MANY, **MIXED}, micro_batches=2),
        PlanOptions(text_tokens=200, image_pixels=224**2),
    ),
    "0.4 billion, all in bfloat16": Case(
        _setup(PolicyOptions(""), **HALF), PlanOptions(text_tokens=48, image_pixels=168**2), LARGER
    ),
    "0.4 billion, adapters": Case(
        _setup(
            PolicyOptions("", freeze=["*visual*"], lora=LoraOptions(32, 64), gradient_checkpointing=False),
            has_reference=True,
        ),
        PlanOptions(text_tokens=48, image_pixels=168**2),
        LARGER,
    ),
}


@contextmanager
def config_of(case: Case) -> Iterator[Setup]:
    """The setup with a directory that has the config of its model."""
    if case.model is None:
        yield case.setup
        return
    with tempfile.TemporaryDirectory() as directory:
        with torch.device("meta"):
            model = build_model(**case.model)
        model.config.save_pretrained(directory)
        model.generation_config.save_pretrained(directory)
        yield dataclasses.replace(case.setup, policy=dataclasses.replace(case.setup.policy, pretrained=directory))


def measure(case: Case) -> dict[str, int]:
    """Bytes that sampling, and a training step with its optimizer, take beside what the process had before.

    What kernels of these shapes keep for themselves (oneDNN makes code for each) is of no run: the tiny ones, for which
    it counts, are run once before.
    """
    _run(case if case.model is None else Case(_setup(TINY, **HALF), PlanOptions(text_tokens=8)))
    gc.collect()
    with PeakMemory() as base:
        pass
    sampling, training = _run(case)
    return {"sampling": sampling - base.before, "training": training - base.before}


def _run(case: Case) -> tuple[int, int]:
    """Peak of the process while it samples, and while it trains a step."""
    with config_of(case) as setup:
        policy = _with_weights(load_policy, setup, case)
        frozen = partial(load_reference, autocast_dtype=setup.compute_dtype if setup.is_mixed else None)
        reference = _with_weights(frozen, setup, case) if setup.reference_model else None
        config = policy.model.config
        prompt = planned_prompt(config, case.plan, setup.prompt, pixel_limits(setup.policy.pretrained, setup.prompt))
        optimizer = setup.optimizer(parameter_groups(policy.model, {}))
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        with PeakMemory() as sampling:
            _sample(setup, policy, prompt)
        with PeakMemory() as training, policy.check_put_off():
            _train(setup, policy, prompt, optimizer)
        del reference
    return sampling.peak, training.peak


def _with_weights(load: Any, setup: Setup, case: Case) -> Policy:
    if case.model is None:
        policy: Policy = load(setup.policy, setup.dtype)
        return policy
    policy = load(setup.policy, setup.dtype, empty=True)
    made: dict[int, torch.nn.Parameter] = {}
    for part in policy.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                new = torch.empty(weight.shape, dtype=weight.dtype).normal_(0, 0.02)
                part._parameters[name] = made.setdefault(id(weight), torch.nn.Parameter(new, weight.requires_grad))
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.rand(buffer.shape, dtype=buffer.dtype)
    return policy


def _autocast(setup: Setup) -> Any:
    return torch.autocast("cpu", setup.compute_dtype) if setup.is_mixed else nullcontext()


def _sample(setup: Setup, policy: Policy, prompt: EncodedPrompt) -> None:
    policy.transformer.generation_config.eos_token_id = -1  # all of them as long as allowed
    engine = setup.engine

    class Silent:
        @staticmethod
        def decode(*_: Any, **__: Any) -> str:
            return ""

    engine.setup(policy, Silent())
    with torch.no_grad(), _autocast(setup):
        engine.generate(policy.encode_images([prompt] * setup.prompts_per_rollout), setup.sampling, seed=0)


def _train(setup: Setup, policy: Policy, prompt: EncodedPrompt, optimizer: torch.optim.Optimizer) -> None:
    batch = dearest(
        policy,
        prompt,
        prompts=setup.prompts_per_rollout,
        group_size=setup.sampling.group_size,
        length=setup.sampling.max_new_tokens,
        steps=setup.updates.steps_per_rollout,
        micro_batches=setup.micro_batches,
    )
    forward_and_backward(policy, batch, setup.sampling.temperature, _autocast(setup))
    optimizer.step()


if __name__ == "__main__":
    print(json.dumps(measure(CASES[sys.argv[1]])))
