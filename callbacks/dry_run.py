"""Trains on the largest micro-batch before the first rollout, to learn what memory the run needs."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Protocol, runtime_checkable

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng

from observe_r1.experience import EncodedPrompt, MicroBatch
from observe_r1.fitting import advice, dearest, forward_and_backward
from observe_r1.module import ObserveR1
from observe_r1.peak_memory import PeakMemory
from observe_r1.readable import gigabytes


@runtime_checkable
class PromptInspector(Protocol):
    """A data module that knows its largest prompt; None when no inspected sample can be used."""

    prompts_per_rollout: int

    def largest_prompt(self, inspected: int) -> EncodedPrompt | None: ...


class DryRun(L.Callback):
    """Runs the dearest micro-batch forward and backward before the first rollout, and reports the memory it takes.

    Every prompt in it is the largest one, every completion as long as allowed; it is dealt out as in training. Nothing
    is learned from it, and random states are put back. What rollouts and the optimizer's step take is not measured.

    Args:
        inspected: Samples among which the largest prompt is looked for: the largest in bytes, and some of every part.
        completion_tokens: Length of the completions; null for `model.sampling.max_new_tokens`, the longest possible.
    """

    def __init__(self, inspected: int = 64, completion_tokens: int | None = None) -> None:
        if inspected < 1 or (completion_tokens is not None and completion_tokens < 1):
            raise ValueError(f"DryRun: inspected ({inspected}) and completion_tokens ({completion_tokens}) start at 1.")
        self.inspected = inspected
        self.completion_tokens = completion_tokens

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, ObserveR1)
        source = getattr(trainer, "datamodule", None)
        if trainer.strategy.handles_gradient_accumulation:
            rank_zero_info(f"Dry run left out: {type(trainer.strategy).__name__} runs the backward in its own engine.")
        elif not isinstance(source, PromptInspector):
            rank_zero_info(f"Dry run left out: {type(source).__name__} has no `largest_prompt`.")
        else:
            rank_zero_info(f"Dry run of the largest micro-batch: looks at up to {self.inspected} samples …")
            with isolate_rng():
                prompt = source.largest_prompt(self.inspected)
                if prompt is None:
                    rank_zero_info("Dry run left out: none of these samples can be used.")
                    return
                prompts = source.prompts_per_rollout // trainer.world_size
                batch = dearest(
                    pl_module.policy,
                    prompt,
                    prompts=prompts,
                    group_size=pl_module.sampling.group_size,
                    length=self.completion_tokens or pl_module.sampling.max_new_tokens,
                    steps=pl_module.updates.steps_per_rollout,
                    micro_batches=trainer.accumulate_grad_batches,
                )
                measure(trainer, pl_module, batch)


def measure(trainer: L.Trainer, module: ObserveR1, batch: MicroBatch) -> None:
    """Trains on a micro-batch and reports. Raises ValueError where the device has too little memory for it."""
    prompts, completions, tokens = len(batch.slices), len(batch.lengths), batch.slices[0].prompt.token_ids.numel()
    size = f"a micro-batch of {prompts} prompt{'s' * (prompts > 1)} of {tokens:,} tokens with {completions} "
    size += f"completion{'s' * (completions > 1)} of {int(batch.lengths[0]):,} tokens"
    is_measured, memory = PeakMemory.is_measured(module.device), PeakMemory(module.device)
    available, advice, policy = gigabytes(memory.available), _advice(trainer, module), module.policy
    started = time.perf_counter()
    try:
        with policy.check_put_off(), memory if is_measured else nullcontext():
            _train_on(trainer, module, batch)
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error):  # on CPU
            raise ValueError(f"Out of memory ({available} on {module.device}) with {size}. {advice}") from error
        if policy.is_checked:
            raise
        rank_zero_info(f"Dry run left out: the forward raised {type(error).__name__}: {error}")  # training falls back
        return
    finally:
        policy.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()  # does nothing without a GPU
    report, added = f"{time.perf_counter() - started:.1f} s.", sum(map(_moments, trainer.optimizers))
    if is_measured:
        mine = torch.tensor(float(memory.peak), device=module.device)
        peak = float(trainer.strategy.reduce(mine, reduce_op="max"))
        for logger in trainer.loggers:
            logger.log_metrics({"memory/dry_run_peak_gib": peak / 2**30}, step=trainer.global_step)
        parts = "the whole process" if module.device.type == "cpu" else "weights, gradients and activations"
        report = f"{gigabytes(peak)} at its peak ({parts}; {available} available), {report}"
    moments = f" The optimizer will add {gigabytes(added)}." if added else ""
    rank_zero_info(f"Dry run: {size} takes {report}{moments}")
    if is_measured and peak + added > memory.available:
        rank_zero_warn(f"Training needs about {gigabytes(peak + added)}, more than the {available} there are. {advice}")


def _train_on(trainer: L.Trainer, module: ObserveR1, batch: MicroBatch) -> None:
    """As a training step does it, with the gradients of the one before in memory."""
    for parameter in module.policy.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    precision = trainer.precision_plugin.forward_context()
    forward_and_backward(module.policy, batch, module.sampling.temperature, precision)
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)


def _advice(trainer: L.Trainer, module: ObserveR1) -> str:
    remedies = advice(
        trainer.accumulate_grad_batches,
        module.policy_options.gradient_checkpointing,
        module.sampling.max_new_tokens,
    )
    return f"{remedies} If completions never get that long: DryRun(completion_tokens=…)."


def _moments(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the two moments that Adam makes at its first step; 0 where they are there, or for other optimizers."""
    if optimizer.state or not isinstance(optimizer, torch.optim.Adam | torch.optim.NAdam | torch.optim.RAdam):
        return 0
    return sum(2 * p.numel() * p.element_size() for group in optimizer.param_groups for p in group["params"])
