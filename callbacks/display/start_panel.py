"""The panel at the start of a run: what is trained on what, by whom, and how to watch it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from observe_r1.callbacks.dry_run import DryRun
from observe_r1.callbacks.lookup import first_of
from observe_r1.callbacks.run_directory import run_directory
from observe_r1.callbacks.terminal import optimizer_steps, show, tensorboard
from observe_r1.callbacks.vllm_weight_sync import VLLMWeightSync
from observe_r1.module import ObserveR1
from observe_r1.quantization import full_shape_and_dtype, is_quantized
from observe_r1.readable import gigabytes, short

ON_SICK = {"warn": "warns of sick patterns", "stop": "stops when it is sick", "ignore": "nobody looks at it"}


class StartPanel(L.Callback):
    """Says before the first step what a run is: on a terminal in a frame, elsewhere in plain lines."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.run_directory = run_directory(trainer)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, ObserveR1)
        if trainer.is_global_zero:
            show("observe_r1", rows(trainer, pl_module, self.run_directory))


def rows(trainer: L.Trainer, module: ObserveR1, directory: Path | None) -> dict[str, str]:
    """What the panel says, by name."""
    found = {
        "model": model(module),
        "memory": memory(trainer, module),
        "questions": questions(trainer),
        "sampling": sampling(trainer, module),
        "a rollout": batches(trainer, module),
        "runs on": devices(trainer),
        "health": f"{ON_SICK[module.on_sick]} (model.on_sick: {module.on_sick})",
    }
    if directory is not None:
        found["written to"] = str(directory)
        found["watch"] = tensorboard(trainer, directory)
        saving = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.save_last]
        if saving:
            last = f"{saving[0].CHECKPOINT_NAME_LAST}{saving[0].FILE_EXTENSION}"
            found["resume"] = f"add --ckpt_path {saving[0].dirpath}/{last}"
    return {name: value for name, value in found.items() if value}


def model(module: ObserveR1) -> str:
    parameters = list(module.policy.parameters())
    total, trained = (sum(map(numbers, some)) for some in (parameters, [p for p in parameters if p.requires_grad]))
    reference = "reference: a frozen copy" if module.reference is not None else "no reference"
    if module.kl.coefficient > 0 and module.reference is None:
        reference = "reference: the model without its adapters"
    share = "all" if trained == total else f"{short(trained)} ({trained / total:.1%})"
    return f"{module.policy_options.pretrained}, {short(total)} parameters, {share} of them trained; {reference}"


def memory(trainer: L.Trainer, module: ObserveR1) -> str:
    """Of what is known without a step; activations are what the dry run measures."""
    parameters = list(module.policy.parameters())
    weights = sum(size(p) * p.element_size() for p in parameters)
    gradients = sum(size(p) * p.element_size() for p in parameters if p.requires_grad)
    reference = (
        0 if module.reference is None else sum(size(p) * p.element_size() for p in module.reference.parameters())
    )
    is_adam = any(isinstance(optimizer, torch.optim.Adam) for optimizer in trainer.optimizers)
    known = {"weights": weights, "gradients": gradients, "Adam": 2 * gradients * is_adam, "reference": reference}
    parts = ", ".join(f"{name} {gigabytes(amount)}" for name, amount in known.items() if amount)
    is_measured = first_of(trainer, DryRun) is not None
    rest = (
        "activations, which the dry run measures" if is_measured else "activations (`observe-r1 plan` estimates them)"
    )
    return f"{gigabytes(sum(known.values()))} for one copy ({parts}), and {rest}"


def questions(trainer: L.Trainer) -> str:
    data: Any = getattr(trainer, "datamodule", None)
    describe = getattr(data, "describe", None)
    return str(describe()) if describe is not None else ""


def sampling(trainer: L.Trainer, module: ObserveR1) -> str:
    engine, options = module.engine, module.sampling
    text = f"{type(engine).__name__}, at most {options.max_new_tokens} tokens, temperature {options.temperature:g}"
    sync = first_of(trainer, VLLMWeightSync)
    if engine.is_trainer:
        return f"{text}; the model samples for itself"
    if sync is None:
        return f"{text}; no VLLMWeightSync, so see that it gets the trained weights"
    gate = sync.gate
    return f"{text}; parity checked: warning above {gate.warn_above}, error above {gate.error_above}"


def batches(trainer: L.Trainer, module: ObserveR1) -> str:
    """The arithmetic from prompts to optimizer steps."""
    data: Any = getattr(trainer, "datamodule", None)
    prompts, group = getattr(data, "prompts_per_rollout", None), module.sampling.group_size
    updates, parts, ranks = module.updates, trainer.accumulate_grad_batches, trainer.world_size
    steps = updates.steps_per_rollout * updates.epochs_per_rollout
    if prompts is None:
        return ""
    text = (
        f"{prompts} prompts × {group} completions → {count(steps, 'optimizer step')} of {count(parts, 'micro-batch')}"
    )
    text += f" on {count(ranks, 'rank')}" if ranks > 1 else ""
    text += f", {prompts * group / (updates.steps_per_rollout * parts * ranks):.4g} completions each"
    total = optimizer_steps(trainer)
    return text if total is None else f"{text}; {count(total, 'step')} in all"


def devices(trainer: L.Trainer) -> str:
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    nodes = f" on {trainer.num_nodes} nodes" if trainer.num_nodes > 1 else ""
    strategy = type(trainer.strategy).__name__.removesuffix("Strategy")
    return f"{trainer.world_size} × {name}{nodes}, {strategy}, precision {trainer.precision}"


def numbers(parameter: torch.nn.Parameter) -> int:
    """Numbers of a parameter, also where two of them are packed in one element."""
    return full_shape_and_dtype(parameter)[0].numel() if is_quantized(parameter) else size(parameter)


def size(parameter: torch.nn.Parameter) -> int:
    """Elements, also of those that a strategy has taken apart (DeepSpeed's ZeRO-3)."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def count(number: int, name: str) -> str:
    plural = "es" if name.endswith("ch") else "s"
    return f"{number} {name}{plural if number != 1 else ''}"
