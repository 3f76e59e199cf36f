"""Copied beside a run, as a user's own file: a rollout that does not depend on ranks, and DeepSpeed on a CPU."""

from __future__ import annotations

import argparse
import atexit
import json
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy

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

    def __init__(self, stage: int = 2) -> None:
        super().__init__(stage)
        # DeepSpeed leaves small weights whole, and the tiny policy has no others
        self.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0

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


class FinalWeights(L.Callback):
    """Writes what `named_weights` gives at the end."""

    def on_fit_end(self, trainer, module):
        named = {name: weight.cpu().clone() for name, weight in module.policy.named_weights()}
        if trainer.is_global_zero:
            torch.save(named, "weights.pt")


class Dealt(L.Callback):
    """Writes, for every rollout, the samples that a rank holds, and the completions that it trains."""

    def __init__(self) -> None:
        self.rollouts = []

    def on_rollout_end(self, trainer, module, experience):
        positions = [group.prompt.prompt.position for group in experience.trained_groups]
        trained = [
            [positions[g], c]
            for step in experience.steps
            for index, assignment in enumerate(step.micro_batches)
            if index not in step.fillers
            for g, completions in assignment
            for c in completions
        ]
        sampled = len(experience.groups)
        self.rollouts.append({"sampled": positions[:sampled], "received": positions[sampled:], "trained": trained})
        Path(f"dealt{trainer.global_rank}.json").write_text(json.dumps(self.rollouts))


class InterruptedSave(L.Callback):
    """Once, the save of an optimizer step does not end on one rank: the disk is full, or the process is killed."""

    def __init__(self, step: int, rank: int, by: str) -> None:
        self.step, self.rank, self.by = step, rank, by

    def on_save_checkpoint(self, trainer, module, checkpoint):
        if trainer.global_step != self.step or trainer.global_rank != self.rank or Path("interrupted").exists():
            return
        Path("interrupted").touch()
        if self.by == "full_disk":  # write(2) fails beyond this size
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
            return
        save, sync = torch.save, os.fsync

        def die_after(write):
            def dying(*arguments, **options):
                write(*arguments, **options)
                os.kill(os.getpid(), signal.SIGKILL)

            return dying

        torch.save, os.fsync = (save, die_after(sync)) if self.by == "kill_at_sync" else (die_after(save), sync)


class Signalled(L.Callback):
    """Sends one rank a signal in an optimizer step, once: in its first micro-batch."""

    def __init__(self, rank: int, step: int, number: str) -> None:
        self.rank, self.step, self.number = rank, step, signal.Signals[number]

    def on_train_batch_start(self, trainer, module, *_):
        at_step = trainer.global_step == self.step - 1 and trainer.global_rank == self.rank
        if at_step and not Path("signalled").exists():
            Path("signalled").touch()
            os.kill(os.getpid(), self.number)


class Impatient(L.Callback):
    """Does not give a network file system its time."""

    def setup(self, trainer, module, stage):
        from observe_r1.callbacks.cluster.shared_checkpoints import SharedCheckpoints

        SharedCheckpoints.patience = 0.0


class LostRank(L.Callback):
    """Kills one rank without warning after an optimizer step, once; the others may hang there, as collectives do."""

    def __init__(self, rank: int, step: int, others_hang: bool) -> None:
        self.rank, self.step, self.others_hang = rank, step, others_hang

    def on_train_start(self, trainer, module):
        if not self.others_hang:  # ranks that have much to clear away: Lightning looks after them every five seconds
            atexit.register(time.sleep, 6)

    def on_train_batch_end(self, trainer, module, *_):
        Path(f"process{trainer.global_rank}").write_text(str(os.getpid()))
        if trainer.global_step == self.step and not Path("killed").exists():
            if trainer.global_rank == self.rank:
                while self.others_hang and not Path("hanging").exists():
                    time.sleep(0.05)
                Path("killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.others_hang:
                Path("hanging").touch()
                time.sleep(600)
