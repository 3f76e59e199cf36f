"""What differs between Lightning's strategies: how models are loaded and spread, and how checkpoints are written."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
    StrategyRegistry,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from observe_r1.atomic_files import intact, replaced_directory
from observe_r1.checkpoint_io import AsyncCheckpoints, AtomicFiles, write_parts
from observe_r1.loading import PolicyOptions, load_policy, load_reference, offload, shard_policy
from observe_r1.objective import ReferenceOffload
from observe_r1.policy import Policy

DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16}
"""Of weights, by precision; float32 with others."""

MIXED_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""In which matrices are multiplied, by precision; as the weights with others."""


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
        if ranks_per_replica is not None and ranks_per_replica < 1:
            raise ValueError(f"FSDP2: ranks_per_replica is {ranks_per_replica}: use 1 or more, or null for all ranks.")
        self.ranks_per_replica = ranks_per_replica
        self._writers: dist.ProcessGroup | None = None  # all ranks, when they write beside the training

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
        path = Path(self.broadcast(filepath))
        if not isinstance(self.checkpoint_io, AsyncCheckpoints):
            write_parts(checkpoint, path)
            return
        if self._writers is None:
            self._writers = dist.new_group(backend="gloo")
        writers = self._writers
        self.checkpoint_io.save_with(lambda copy: write_parts(copy, path, writers), checkpoint)

    def teardown(self) -> None:
        try:
            self.checkpoint_io.teardown()  # Lightning leaves it out for this strategy
        finally:
            super().teardown()

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
        path = Path(self.broadcast(filepath))
        with replaced_directory(path, self.is_global_zero, self.barrier) as partial:
            super().save_checkpoint(checkpoint, partial, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return super().load_checkpoint(intact(checkpoint_path), weights_only)


StrategyRegistry.register("fsdp2", FSDP2, description="torch's fully_shard over all ranks")
for _name, _entry in list(StrategyRegistry.items()):  # Lightning's own names, such as deepspeed_stage_2, mean ours
    if _entry["strategy"] is DeepSpeedStrategy:
        StrategyRegistry.register(_name, DeepSpeed, _entry["description"], override=True, **_entry["init_params"])


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
    _check_checkpoint_io(strategy)
    if isinstance(strategy, DeepSpeedStrategy):
        assert isinstance(strategy.config, dict)
        # Lightning would ask the train loader, which needs the models
        strategy.config.setdefault("train_micro_batch_size_per_gpu", 1)


def _check_checkpoint_io(strategy: Strategy) -> None:
    """Makes Lightning's way of writing files safe, and refuses what would be ignored."""
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = AtomicFiles()
    if isinstance(strategy, DeepSpeedStrategy) and isinstance(
        strategy.checkpoint_io, AsyncCheckpoints | AsyncCheckpointIO
    ):
        raise ValueError(
            "trainer.plugins has asynchronous checkpoints, and DeepSpeed writes its own: take them out, or use fsdp2 "
            "(--config strategies/fsdp2.yaml), which can."
        )
    if isinstance(strategy, FSDP2) and isinstance(strategy.checkpoint_io, AsyncCheckpointIO):
        raise ValueError(
            "trainer.plugins has Lightning's AsyncCheckpointIO, which is nothing for sharded weights: use "
            "observe_r1.checkpoint_io.AsyncCheckpoints (--config checkpoints/async.yaml)."
        )


def load_models(
    strategy: Strategy, options: PolicyOptions, precision: str, offload_reference: ReferenceOffload | None
) -> tuple[Policy, Policy | None]:
    """The policy, and the reference model where one is wanted, spread as the strategy does it.

    Args:
        offload_reference: `kl.reference_offload`; None for no reference model.
    """
    with_reference = offload_reference is not None
    if offload_reference in ("model", "blocks") and _shards_weights(strategy):
        raise ValueError(
            f"kl.reference_offload is {offload_reference}, and {type(strategy).__name__} spreads the reference model "
            "over the ranks already: set it to none."
        )
    dtype, mixed = DTYPES.get(precision, torch.float32), MIXED_DTYPES.get(precision)
    if options.quantization is not None:
        if isinstance(strategy, FSDP2 | DeepSpeedStrategy):
            raise ValueError(
                f"policy.quantization is {options.quantization}, and weights in 4 bits cannot be spread by "
                f"{type(strategy).__name__}: use ddp (--config strategies/ddp.yaml) or one device, where a rank holds "
                "a quarter of them, or policy.quantization: null."
            )
        # frozen weights need no more digits than they compute with; adapters stay float32
        dtype = mixed or dtype
    if isinstance(strategy, FSDP2):
        mesh = strategy.weight_mesh
        policy = shard_policy(load_policy, options, dtype, mesh, mixed)
        # frozen, it needs no more digits than it computes with
        reference = shard_policy(load_reference, options, mixed or dtype, mesh) if with_reference else None
        return policy, reference
    if isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3:
        from transformers.integrations import HfDeepSpeedConfig

        loads_parts = HfDeepSpeedConfig(strategy.config)  # transformers asks for it as long as it lives
        policy = load_policy(options, dtype)
        policy.in_lockstep = True
        reference = _zero_reference(strategy, load_reference(options, dtype)) if with_reference else None
        del loads_parts
        return policy, reference
    if offload_reference is None:
        return load_policy(options, dtype), None
    if isinstance(strategy, DeepSpeedStrategy):
        reference = load_reference(options, mixed or dtype)  # its engine casts the whole policy: there is no autocast
    else:
        reference = load_reference(options, dtype, mixed)
    if offload_reference == "none":
        reference.to(strategy.root_device)
    else:
        offload(reference, strategy.root_device, by_block=offload_reference == "blocks")
    return load_policy(options, dtype), reference


def _shards_weights(strategy: Strategy) -> bool:
    return isinstance(strategy, FSDP2) or (isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3)


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
