"""What a plan needs to know about a run; nothing of it is loaded or started."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.optim import Optimizer

from observe_r1.collection import UpdateOptions
from observe_r1.encoding import PromptOptions
from observe_r1.loading import PolicyOptions
from observe_r1.objective import ReferenceOffload
from observe_r1.rollout.base import RolloutEngine, SamplingOptions


@dataclass(frozen=True)
class Spread:
    """How a strategy lays a model over ranks.

    Args:
        kind: `zero1` to `zero3` are DeepSpeed's stages.
        ranks: That train.
        ranks_per_replica: That share one copy of what is spread; 0: all of them.
        offload_optimizer: Optimizer and master weights are in the memory of the CPU.
        offload_parameters: Weights are, too.
        reduce_bucket: Elements of DeepSpeed's buffer for gradients on their way.
        buckets: Number of such buffers.
        copies_gradients: DDP's buckets hold all gradients a second time.
    """

    kind: Literal["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"] = "single"
    ranks: int = 1
    ranks_per_replica: int = 0
    offload_optimizer: bool = False
    offload_parameters: bool = False
    reduce_bucket: int = 0
    buckets: int = 1
    copies_gradients: bool = False

    @property
    def parts(self) -> int:
        """Ranks over which weights, or with ZeRO 1 and 2 the optimizer, are spread."""
        return 1 if self.kind in ("single", "ddp") else self.ranks_per_replica or self.ranks

    @property
    def is_zero(self) -> bool:
        return self.kind.startswith("zero")

    @property
    def gathers_weights(self) -> bool:
        """A rank has a part of every weight, and gathers what it computes with."""
        return self.kind in ("fsdp2", "zero3")


@dataclass(frozen=True)
class Setup:
    """A configured run.

    Args:
        dtype: Of the weights that are kept.
        compute_dtype: That matrices are multiplied in: another one than `dtype` under mixed precision.
        precision: As the trainer has it, to be shown.
        has_reference: Log-probs of a reference are needed.
        reference_offload: Of the KL options.
        optimizer: Makes the optimizer of parameters or groups.
        prompts_per_rollout: Over all ranks.
        micro_batches: Of an optimizer step, on each rank.
    """

    policy: PolicyOptions
    prompt: PromptOptions
    sampling: SamplingOptions
    updates: UpdateOptions
    engine: RolloutEngine
    optimizer: Callable[[Any], Optimizer]
    dtype: torch.dtype
    compute_dtype: torch.dtype
    precision: str
    has_reference: bool
    prompts_per_rollout: int
    micro_batches: int = 1
    spread: Spread = field(default_factory=Spread)
    reference_offload: ReferenceOffload = "none"

    @property
    def prompts_per_rank(self) -> int:
        """Raises ValueError where they cannot be shared evenly."""
        if self.prompts_per_rollout % self.spread.ranks:
            raise ValueError(
                f"data.prompts_per_rollout is {self.prompts_per_rollout}, which {self.spread.ranks} ranks cannot share "
                f"evenly: use a multiple of {self.spread.ranks}."
            )
        return self.prompts_per_rollout // self.spread.ranks

    @property
    def reference_model(self) -> bool:
        """The reference is a model of its own, not the policy with adapters off."""
        return self.has_reference and self.policy.lora is None

    @property
    def is_mixed(self) -> bool:
        """Weights are cast to be computed with."""
        return self.dtype != self.compute_dtype
