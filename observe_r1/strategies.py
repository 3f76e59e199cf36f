"""What differs between Lightning's strategies: how models are loaded and spread, and how checkpoints are written."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
    StrategyRegistry,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from observe_r1.loading import PolicyOptions, load_policy, load_reference, shard_policy
from observe_r1.policy import Policy

DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16}
PARTIAL, PREVIOUS = ".partial", ".previous"


class FSDP2(ModelParallelStrategy):
    """Fully sharded data parallelism of torch's second generation (`fully_shard`), over all ranks.

    With `trainer.precision: bf16-mixed`, weights, gradients and optimizer are float32 in parts, and what is gathered to
    compute with is bfloat16.

    Args:
        ranks_per_replica: Ranks that share one copy of the model; null for all of them. The GPUs of a node, for
            instance: weights then travel within nodes, and only gradients between them.
        save_distributed_checkpoint: A directory that every rank writes its part to; false: rank 0 writes one file.
        options: Of Lightning's ModelParallelStrategy.
    """

    def __init__(
        self, ranks_per_replica: int | None = None, save_distributed_checkpoint: bool = True, **options: Any
    ) -> None:
        super().__init__(save_distributed_checkpoint=save_distributed_checkpoint, **options)
        self.ranks_per_replica = ranks_per_replica

    def setup_environment(self) -> None:
        world_size = self.num_nodes * self.num_processes
        if self.ranks_per_replica is not None and world_size % self.ranks_per_replica:
            raise ValueError(
                f"FSDP2: ranks_per_replica is {self.ranks_per_replica}, which does not divide the {world_size} ranks."
            )
        self._data_parallel_size, self._tensor_parallel_size = world_size, 1
        super().setup_environment()

    @property
    def weight_mesh(self) -> DeviceMesh:
        """Over which weights are spread."""
        replica = self.ranks_per_replica or self.world_size
        if replica == self.world_size:
            return self.device_mesh["data_parallel"]
        shape = (self.world_size // replica, replica)
        return init_device_mesh(self.root_device.type, shape, mesh_dim_names=("replicas", "parts"))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        with written_whole(self, filepath) as partial:
            super().save_checkpoint(checkpoint, partial, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return super().load_checkpoint(intact(checkpoint_path), weights_only)


class DeepSpeed(DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy, with checkpoints that are there whole or not at all.

    Args:
        stage: 1 spreads the optimizer, 2 gradients too, 3 weights too.
        options: Of Lightning's DeepSpeedStrategy.
    """

    def __init__(self, stage: int = 2, **options: Any) -> None:
        if find_spec("deepspeed") is None:
            raise ValueError("trainer.strategy needs DeepSpeed: pip install 'observe-r1[deepspeed]'.")
        super().__init__(stage=stage, **options)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        with written_whole(self, filepath) as partial:
            super().save_checkpoint(checkpoint, partial, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return super().load_checkpoint(intact(checkpoint_path), weights_only)


StrategyRegistry.register("fsdp2", FSDP2, description="torch's fully_shard over all ranks")


# ---- models ----------------------------------------------------------------------------------------------------------


def prepare(strategy: Strategy) -> None:
    """What a strategy has to know before models are made.

    Raises:
        ValueError: The models cannot be trained with this strategy.
    """
    if isinstance(strategy, FSDPStrategy):
        raise ValueError(
            "trainer.strategy is fsdp, whose flat parameters the rollout cannot read: use fsdp2 "
            "(--config strategies/fsdp2.yaml), its successor."
        )
    if isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, FSDP2):
        raise ValueError("trainer.strategy is ModelParallelStrategy: use fsdp2, which sets it up for data parallelism.")
    if isinstance(strategy, DeepSpeedStrategy):
        assert isinstance(strategy.config, dict)
        # Lightning would ask the train loader, which needs the models
        strategy.config.setdefault("train_micro_batch_size_per_gpu", 1)


def load_models(
    strategy: Strategy, options: PolicyOptions, precision: str, with_reference: bool
) -> tuple[Policy, Policy | None]:
    """The policy, and the reference model where one is wanted, spread as the strategy does it."""
    dtype = DTYPES.get(precision, torch.float32)
    if isinstance(strategy, FSDP2):
        mesh, compute = strategy.weight_mesh, torch.bfloat16 if precision == "bf16-mixed" else None
        policy = shard_policy(load_policy, options, dtype, mesh, compute)
        # frozen, it needs no more digits than it computes with
        reference = shard_policy(load_reference, options, compute or dtype, mesh) if with_reference else None
        return policy, reference
    if isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3:
        from transformers.integrations import HfDeepSpeedConfig

        loads_parts = HfDeepSpeedConfig(strategy.config)  # transformers asks for it as long as it lives
        policy = load_policy(options, dtype)
        policy.in_lockstep = True
        reference = _zero_reference(strategy, load_reference(options, dtype)) if with_reference else None
        del loads_parts
        return policy, reference
    reference = load_reference(options, dtype).to(strategy.root_device) if with_reference else None
    return load_policy(options, dtype), reference


def _zero_reference(strategy: DeepSpeedStrategy, reference: Policy) -> Policy:
    """Its parts are gathered by hooks that an engine of its own puts on its modules."""
    import deepspeed

    assert isinstance(strategy.config, dict)
    wanted = ("train_micro_batch_size_per_gpu", "zero_optimization", "bf16", "fp16")
    config = {name: strategy.config[name] for name in wanted if name in strategy.config}
    config["zero_optimization"] = {
        name: value for name, value in config["zero_optimization"].items() if name != "offload_optimizer"
    }
    deepspeed.initialize(model=reference, config=config, dist_init_required=False)
    reference.in_lockstep = True
    return reference


def engine_gradient_norm(strategy: Strategy) -> float | None:
    """Of the optimizer step that DeepSpeed's engine has just taken; None for others, which leave gradients to see."""
    if not isinstance(strategy, DeepSpeedStrategy):
        return None
    engine = strategy.deepspeed_engine
    is_step = engine.micro_steps % engine.gradient_accumulation_steps() == 0
    norm = engine.get_global_grad_norm() if is_step else None
    return None if norm is None else float(norm)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@contextmanager
def written_whole(strategy: Strategy, target: Any) -> Iterator[Path]:
    """A directory to write to, which takes the place of `target` when all ranks have written.

    What was there stays until then, so a crash leaves one or the other.
    """
    path = Path(strategy.broadcast(target))
    partial, previous = (path.with_name(path.name + ending) for ending in (PARTIAL, PREVIOUS))
    if strategy.is_global_zero and partial.exists():
        shutil.rmtree(partial)
    strategy.barrier()
    yield partial
    strategy.barrier()
    if strategy.is_global_zero:
        _remove(previous)
        if path.exists():
            path.rename(previous)
        partial.rename(path)
        _remove(previous)
    strategy.barrier()


def intact(path: Any) -> Path:
    """The checkpoint, or the one before it where a crash came between the two renames that replace it."""
    previous = Path(path).with_name(Path(path).name + PREVIOUS)
    return previous if not Path(path).exists() and previous.exists() else Path(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
