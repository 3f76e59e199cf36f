"""A training with vLLM: transfers, the parity gate, and what is logged of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from observe_r1.callbacks import VLLMWeightSync
from observe_r1.collection import UpdateOptions
from observe_r1.datamodules import NeuraLadderDataModule
from observe_r1.encoding import PromptOptions
from observe_r1.experience import Experience
from observe_r1.loading import PolicyOptions
from observe_r1.module import ObserveR1
from observe_r1.rollout import SamplingOptions, VLLMLocalRollout
from observe_r1.rollout.vllm_requests import TakenOver

from .comparison import NEEDS_VLLM

pytestmark = NEEDS_VLLM


class Recorder(L.Callback):
    """Keeps what rollouts and validations saw. Comes after the weight sync in the list."""

    def __init__(self) -> None:
        self.versions: list[tuple[str, int, int | None]] = []
        self.metrics: list[dict[str, float]] = []

    def on_rollout_end(self, trainer: L.Trainer, pl_module: ObserveR1, experience: Experience) -> None:
        assert isinstance(pl_module.engine, VLLMLocalRollout)
        self.versions.append(("rollout", trainer.global_step, pl_module.engine.version))
        self.metrics.append(dict(experience.metrics))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, ObserveR1)
        assert isinstance(pl_module.engine, VLLMLocalRollout)
        self.versions.append(("validation", trainer.global_step, pl_module.engine.version))


def fit(ladder: Path, held_out: Path, *callbacks: L.Callback, steps: int = 4, lr: float = 1e-2, **options: Any) -> None:
    """Rollouts of 4 prompts with 4 completions, each trained on in 2 steps; a validation after every second step."""
    L.seed_everything(0)
    module = ObserveR1(
        PolicyOptions("quickstart", gradient_checkpointing=False),
        PromptOptions(system_prompt=None),
        SamplingOptions(group_size=4, max_new_tokens=12),
        rollout=VLLMLocalRollout(cache_gib=0.25, max_model_len=512),
        updates=UpdateOptions(steps_per_rollout=2),
        optimizer=lambda weights: torch.optim.AdamW(weights, lr=lr),
    )
    data = NeuraLadderDataModule(str(ladder), held_out=str(held_out), prompts_per_rollout=4, workers=0)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        limit_val_batches=1,
        val_check_interval=2,
        **options,
    )
    trainer.fit(module, datamodule=data)


def test_rollouts_and_validations_use_the_weights_of_their_step(tiny_ladder: Path, held_out_ladder: Path) -> None:
    recorder = Recorder()
    fit(tiny_ladder, held_out_ladder, VLLMWeightSync(parity_every=2), recorder, steps=6)
    assert recorder.versions == [
        *(("validation", 0, 0), ("rollout", 0, 0)),
        *(("validation", 2, 2), ("rollout", 2, 2)),
        *(("validation", 4, 4), ("rollout", 4, 4)),
        ("validation", 6, 6),
    ]
    first, second, third = recorder.metrics
    assert all(metrics["parity/max"] < 1e-4 for metrics in (first, third))
    assert "parity/mean" not in second  # one transfer since the comparison before
    assert "seconds/weight_sync" not in first  # the engine started with these weights
    for metrics in (second, third):
        assert metrics["speed/weight_sync_bytes_per_second"] * metrics["seconds/weight_sync"] == pytest.approx(
            sum(w.numel() * w.element_size() for w in load_weights()), rel=1e-6
        )


class Evaluator(L.Callback):
    """Asks for the engine beside the training after every step, as benchmarks do."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int | None]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        assert isinstance(pl_module, ObserveR1)
        with pl_module.evaluating() as engine:
            assert isinstance(engine, VLLMLocalRollout)
            self.seen.append((trainer.global_step, engine.version))


def test_evaluations_use_the_weights_of_their_step(tiny_ladder: Path, held_out_ladder: Path) -> None:
    """Between rollouts and within one; the gate compares after the transfers that evaluations asked for."""
    evaluator, recorder = Evaluator(), Recorder()
    fit(tiny_ladder, held_out_ladder, VLLMWeightSync(), evaluator, recorder, steps=4)
    assert evaluator.seen == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert all(metrics["parity/max"] < 1e-4 for metrics in recorder.metrics)


def load_weights() -> list[torch.Tensor]:
    from observe_r1.loading import load_policy

    return list(load_policy(PolicyOptions("quickstart")).parameters())


def test_weights_that_were_not_taken_over_are_an_error(
    tiny_ladder: Path, held_out_ladder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate, with an engine that says it has the weights and has not."""

    def pretend(self: VLLMLocalRollout, weights: Any, version: int) -> None:
        if self.version is None:
            real(self, weights, version)
        list(weights)
        assert self._policy is not None
        self._taken_over, self.version = TakenOver(self._policy), version

    real = VLLMLocalRollout.update_weights
    monkeypatch.setattr(VLLMLocalRollout, "update_weights", pretend)
    with pytest.raises(RuntimeError, match=r"VLLMLocalRollout differ from the trainer's .* The error limit is 0\.01"):
        fit(tiny_ladder, held_out_ladder, VLLMWeightSync(warn_above=0.001, error_above=0.01))


def test_a_training_without_the_callback_stops(tiny_ladder: Path, held_out_ladder: Path) -> None:
    with pytest.raises(RuntimeError, match=r"add observe_r1\.callbacks\.VLLMWeightSync"):
        fit(tiny_ladder, held_out_ladder)
