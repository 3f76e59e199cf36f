"""`observe-r1 plan`: the configs of a training, and what it will take in memory and time."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import torch
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, StrategyRegistry
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn

from observe_r1.lightning_cli import ObserveR1CLI
from observe_r1.module import ObserveR1
from observe_r1.planning.devices import this_gpu
from observe_r1.planning.options import PlanOptions
from observe_r1.planning.plan import Plan, device_of, make_plan, write_json
from observe_r1.planning.setup import Setup, Spread
from observe_r1.planning.terminal import show
from observe_r1.strategies import DTYPES, FSDP2, MIXED_DTYPES


class PlanCLI(ObserveR1CLI):
    """Reads the configs of a training, and options of the planner beside them; starts nothing of it."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(PlanOptions, "plan")

    def instantiate_classes(self) -> None:
        """Neither devices nor packages of the trainer have to be here."""
        self.trainer_options: dict[str, Any] = self.config.trainer.as_dict()
        for name, value in {"strategy": "auto", "callbacks": None, "logger": False, "plugins": None}.items():
            self.config.trainer[name] = value
        self.config_init = self.parser.instantiate_classes(self.config)
        self.model, self.datamodule = self.config_init.model, self.config_init.data


def plan(module: ObserveR1, data: Any, trainer: dict[str, Any], options: PlanOptions) -> Plan:
    """Prints the plan of a configured training.

    Args:
        module: Not loaded.
        data: Its data module.
        trainer: Options of the trainer, as they are configured.
        options: Of the planner.

    Raises:
        ValueError: The run could not be started, or the model's config is nowhere.
    """
    console = Console()
    device = device_of(options, str(trainer["accelerator"]), this_gpu)
    setup = read_setup(module, data.prompts_per_rollout, trainer, options, device.kind)
    columns = SpinnerColumn(), TextColumn("rehearsing without weights: {task.description}")
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("")
        made = make_plan(setup, device, options, lambda step: progress.update(task, description=step))
    show(made, console)
    if options.json is not None:
        write_json(made, options.json)
    return made


def read_setup(
    module: ObserveR1, prompts_per_rollout: int, trainer: dict[str, Any], options: PlanOptions, kind: str
) -> Setup:
    """What the planner has to know of a configuration.

    Args:
        kind: Of device: `cuda` or `cpu`.
    """
    precision = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}.get(
        str(trainer["precision"] or "32"), str(trainer["precision"] or "32-true")
    )
    ranks = _number_of_devices(trainer, options, kind) * int(options.nodes or trainer["num_nodes"] or 1)
    spread = read_strategy(trainer["strategy"], ranks)
    dtype = DTYPES.get(precision, torch.float32)
    compute = MIXED_DTYPES.get(precision, dtype)
    quantization = module.policy_options.quantization
    if quantization is not None:
        if spread.kind not in ("single", "ddp"):
            raise ValueError(
                f"policy.quantization is {quantization}, and weights in 4 bits cannot be spread by trainer.strategy: "
                "use ddp (--config strategies/ddp.yaml) or one device, or policy.quantization: null."
            )
        dtype = compute  # as `load_models` has it
    return Setup(
        policy=module.policy_options,
        prompt=module.prompt_options,
        sampling=module.sampling,
        updates=module.updates,
        engine=module.engine,
        optimizer=module.optimizer,
        dtype=dtype,
        compute_dtype=compute,
        precision=precision,
        has_reference=module.kl.coefficient > 0,
        prompts_per_rollout=prompts_per_rollout,
        micro_batches=int(trainer["accumulate_grad_batches"] or 1),
        spread=spread,
        reference_offload=module.kl.reference_offload,
    )


def read_strategy(configured: Any, ranks: int) -> Spread:
    """How a configured strategy lays models over ranks; it is not made, for which devices would have to be here.

    Args:
        configured: A name that Lightning knows, or `class_path` and `init_args`.

    Raises:
        ValueError: No training could use it.
    """
    if isinstance(configured, str):
        if configured == "auto":
            return Spread("single") if ranks == 1 else Spread("ddp", ranks, copies_gradients=True)
        if configured not in StrategyRegistry:
            raise ValueError(f"trainer.strategy is {configured!r}, which Lightning does not know.")
        entry = StrategyRegistry[configured]
        strategy, chosen = entry["strategy"], dict(entry["init_params"])
    else:
        module, _, name = configured["class_path"].rpartition(".")
        strategy, chosen = getattr(import_module(module), name), dict(configured.get("init_args") or {})
    if issubclass(strategy, FSDP2):
        return Spread("fsdp2", ranks, int(chosen.get("ranks_per_replica") or 0))
    if issubclass(strategy, DeepSpeedStrategy):
        defaults = {
            name: parameter.default for name, parameter in inspect.signature(DeepSpeedStrategy).parameters.items()
        }
        given = {**defaults, **{name: value for name, value in chosen.items() if value is not None}}
        stage = int(given["stage"])
        if not 1 <= stage <= 3:
            raise ValueError(f"trainer.strategy has stage {stage}, but DeepSpeed's ZeRO has stages 1, 2 and 3.")
        kinds = {1: "zero1", 2: "zero2", 3: "zero3"}
        return Spread(
            kinds[stage],  # type: ignore[arg-type]
            ranks,
            offload_optimizer=bool(given["offload_optimizer"]),
            offload_parameters=bool(given["offload_parameters"]) and stage == 3,
            reduce_bucket=int(given["reduce_bucket_size"]),
            buckets=1 + bool(given["overlap_comm"]),
        )
    if issubclass(strategy, DDPStrategy):
        return Spread("ddp", ranks, copies_gradients=not chosen.get("gradient_as_bucket_view"))
    if issubclass(strategy, SingleDeviceStrategy) and ranks == 1:
        return Spread("single")
    raise ValueError(
        f"trainer.strategy is {strategy.__name__}, which is not planned for, and ranks are {ranks}. Use auto, ddp, "
        "fsdp2 or DeepSpeed (configs/strategies/)."
    )


def _number_of_devices(trainer: dict[str, Any], options: PlanOptions, kind: str) -> int:
    """On a node, as Lightning reads `trainer.devices`."""
    if options.devices is not None:
        return options.devices
    devices = trainer["devices"]
    if isinstance(devices, str) and "," in devices:
        devices = [part for part in devices.split(",") if part.strip()]
    if isinstance(devices, list):
        return len(devices)
    if str(devices) in ("auto", "-1"):
        return max(torch.cuda.device_count(), 1) if kind == "cuda" else 1
    return int(devices)
