"""Gives a rollout engine with weights of its own the weights that have been trained, and checks that it has them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator

import lightning as L
from torch import Tensor

from observe_r1.callbacks.parity_gate import ParityGate
from observe_r1.experience import Experience
from observe_r1.module import ObserveR1


class VLLMWeightSync(L.Callback):
    """Before a rollout, validation or evaluation, streams the weights into the engine if they have changed.

    After the first rollout and the first one after every `parity_every`-th transfer, the sampler's log-probs are
    compared with the trainer's on the same tokens (`parity/mean`, `parity/max`, `parity/kl`). A transfer is logged as
    `seconds/weight_sync` and `speed/weight_sync_bytes_per_second`. Outside of these the engine sleeps, if it can.

    Args:
        parity_every: Transfers from one comparison to the next.
        warn_above: Mean distance of log-probs per token from which there is a warning; bf16 on both sides stays below.
        error_above: Mean distance that ends the training.
    """

    def __init__(self, parity_every: int = 1, warn_above: float = 0.02, error_above: float = 0.2) -> None:
        if parity_every < 1:
            raise ValueError(f"VLLMWeightSync: parity_every is {parity_every}, but it must be at least 1.")
        self.parity_every = parity_every
        self.gate = ParityGate(warn_above, error_above)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, ObserveR1)
        if pl_module.engine.is_trainer:
            raise ValueError(
                f"VLLMWeightSync: the engine {type(pl_module.engine).__name__} samples with the trained model itself, "
                "so there is nothing to transfer: remove the callback, or set model.rollout to "
                "observe_r1.rollout.VLLMLocalRollout or VLLMServerRollout."
            )
        # vLLM leaves a process group of one process, and Lightning takes it for a distributed training
        warnings.filterwarnings("ignore", message=r".*sync_dist=True.*to accumulate the metric across devices")
        self._held: int | None = None  # number of optimizer steps behind the weights in the engine
        self._transfers = 0
        self._figures: dict[str, float] = {}  # of the last transfer, until a rollout logs them
        self._to_compare = True

    def on_rollout_start(self, trainer: L.Trainer, pl_module: ObserveR1) -> None:
        self._sync(trainer, pl_module)

    def on_rollout_end(self, trainer: L.Trainer, pl_module: ObserveR1, experience: Experience) -> None:
        pl_module.engine.sleep()
        # an engine that samples ahead has sent them for the next rollout: they are logged all the same
        figures, self._figures = self._figures, {}
        # completions that were sampled ahead are compared anew, and only with weights that the engine has
        is_comparable = experience.metrics["rollout/steps_behind"] == 0 or self._held == trainer.global_step
        if self._to_compare and is_comparable:
            figures |= self.gate.check(trainer, pl_module, experience)
            self._to_compare = False
        experience.metrics.update(figures)  # the module logs them

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, ObserveR1)
        self._sync(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, ObserveR1)
        pl_module.engine.sleep()

    def on_evaluation_start(self, trainer: L.Trainer, pl_module: ObserveR1) -> None:
        self._sync(trainer, pl_module)

    def on_evaluation_end(self, trainer: L.Trainer, pl_module: ObserveR1) -> None:
        pl_module.engine.sleep()

    def _sync(self, trainer: L.Trainer, module: ObserveR1) -> None:
        module.engine.wake()
        # an engine that has yet to be set up will start with the weights as they are now
        if self._held != trainer.global_step and "collector" in vars(module):
            size, started = _Size(), time.perf_counter()
            module.engine.update_weights(size.counted(module.policy.named_weights()), version=trainer.global_step)
            seconds = time.perf_counter() - started
            module.clock.add("weight_sync", seconds)
            self._figures = {
                "seconds/weight_sync": seconds,
                "speed/weight_sync_bytes_per_second": size.total / seconds,
            }
            self._transfers += 1
            self._to_compare |= self._transfers % self.parity_every == 0
        self._held = trainer.global_step


class _Size:
    """Counts the bytes of weights that pass."""

    total = 0

    def counted(self, weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, weight in weights:
            self.total += weight.numel() * weight.element_size()
            yield name, weight
