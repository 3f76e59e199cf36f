"""Copied beside a run, as a user's own file: a rollout that does not depend on ranks, and DeepSpeed on a CPU."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.strategies.ddp import DDPStrategy

from observe_r1.experience import Completion
from observe_r1.rewards import Reward
from observe_r1.rewards.base import CorrectnessReward
from observe_r1.rollout import RolloutEngine
from observe_r1.strategies import DeepSpeed


class ScriptedRollout(RolloutEngine):
    """Ragged random completions that follow from the sample alone, on whatever rank it is."""

    def generate(self, prompts, sampling, seed):
        return [[self.completion(prompt, number) for number in range(sampling.group_size)] for prompt in prompts]

    def completion(self, prompt, number):
        generator = torch.Generator().manual_seed(1000 * prompt.prompt.position + number)
        length = int(torch.randint(1, 24, (), generator=generator))
        tokens = torch.randint(20, 260, (length,), generator=generator)
        return Completion(tokens, -5 - torch.rand(length, generator=generator), "", False)


class EvenLength(CorrectnessReward):
    """Right are completions of an even number of tokens."""

    def judge_groups(self, groups):
        return [[len(completion) % 2 == 0 for completion in group.completions] for group in groups]

    def score(self, prompt, completion):
        raise NotImplementedError("judged by the group")


class Shortness(Reward):
    def score(self, prompt, completion):
        return -0.01 * len(completion)


class CPUDeepSpeed(DeepSpeed):
    """DeepSpeed itself runs on a CPU; Lightning's strategy refuses one."""

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(self, model: Any, optimizer: Any, lr_scheduler: Any = None) -> Any:
        import deepspeed

        trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
        engine, wrapped, _, _ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self.local_rank),
            config=self.config,
            model=model,
            model_parameters=trained,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        return engine, wrapped


class Recorder(L.Callback):
    """Loss, gradient norm and loss of every optimizer step, and the final weights, in files."""

    def __init__(self, weights: bool = True) -> None:
        self.rows: list[dict[str, float]] = []
        self.weights = weights

    def on_train_batch_end(self, trainer, module, *_):
        if (trainer.fit_loop.total_batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            figures = trainer.logged_metrics
            self.rows.append({name: float(figures[name]) for name in ("train/loss", "train/kl", "train/gradient_norm")})

    def on_fit_end(self, trainer, module):
        named = {name: weight.cpu().clone() for name, weight in module.policy.named_weights()}
        if trainer.is_global_zero:
            Path("steps.json").write_text(json.dumps(self.rows))
            torch.save(named, "weights.pt")
