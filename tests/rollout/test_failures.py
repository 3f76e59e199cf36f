"""An engine that fails: what checkpoints hold then, and that a resumed run has every prompt in its place."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from observe_r1.collection import UpdateOptions
from observe_r1.datamodules import NeuraLadderDataModule
from observe_r1.encoding import PromptOptions
from observe_r1.experience import Completion, EncodedPrompt, Experience, Sampled
from observe_r1.loading import PolicyOptions
from observe_r1.module import ObserveR1
from observe_r1.rollout import RolloutEngine, SamplingOptions


class Failing(RolloutEngine):
    """Completions that follow from the sample; one of its calls raises instead."""

    def __init__(self, async_steps: int, failing_call: int = 0) -> None:
        self.async_steps = async_steps
        self.failing_call = failing_call
        self.calls = 0
        self.background = ThreadPoolExecutor(1)

    def generate(
        self, prompts: Sequence[EncodedPrompt], sampling: SamplingOptions, seed: int
    ) -> list[list[Completion]]:
        self.calls += 1
        if self.calls == self.failing_call:
            raise RuntimeError("No server is left.")
        return [[self.completion(prompt, c) for c in range(sampling.group_size)] for prompt in prompts]

    def begin(self, prompts: Sequence[EncodedPrompt], sampling: SamplingOptions, seed: int) -> Future[Sampled]:
        if not self.async_steps:
            return super().begin(prompts, sampling, seed)
        return self.background.submit(self.timed_generate, prompts, sampling, seed)

    def completion(self, prompt: EncodedPrompt, number: int) -> Completion:
        tokens = torch.full((2 + number,), 20 + prompt.prompt.position)
        return Completion(tokens, torch.full((len(tokens),), -5.0), "", False)


class Notes(L.Callback):
    """Positions of the prompts that are trained on, by step."""

    def __init__(self) -> None:
        self.positions: dict[int, list[int]] = {}

    def on_rollout_end(self, trainer: L.Trainer, pl_module: ObserveR1, experience: Experience) -> None:
        self.positions[trainer.global_step] = [group.prompt.prompt.position for group in experience.groups]


def fit(directory: Path, ladder: Path, engine: Failing, checkpoint: Path | None = None) -> dict[int, list[int]]:
    L.seed_everything(0)
    module = ObserveR1(
        PolicyOptions("quickstart", gradient_checkpointing=False),
        PromptOptions(system_prompt=None),
        SamplingOptions(group_size=2, max_new_tokens=4),
        rollout=engine,
        updates=UpdateOptions(steps_per_rollout=2),
        optimizer=lambda weights: torch.optim.SGD(weights, lr=1e-3),
    )
    saving = ModelCheckpoint(directory, every_n_train_steps=3, save_last=True, save_top_k=0, save_on_exception=True)
    notes = Notes()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[saving, notes],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, datamodule=NeuraLadderDataModule(str(ladder), prompts_per_rollout=6, workers=0),
                ckpt_path=checkpoint)  # fmt: skip
    return notes.positions


@pytest.mark.parametrize("async_steps", [0, 1])
def test_no_prompt_is_lost_when_sampling_fails(tmp_path: Path, tiny_ladder: Path, async_steps: int) -> None:
    """The third rollout, of steps 4 and 5. Sampled ahead it has failed before the checkpoint of step 3.

    The last one is saved when the error ends the training.
    """
    with pytest.raises(RuntimeError, match="No server is left"):
        fit(tmp_path, tiny_ladder, Failing(async_steps, failing_call=3))
    went_on = fit(tmp_path / "resumed", tiny_ladder, Failing(async_steps), tmp_path / "last.ckpt")
    assert went_on == {4: [12, 13, 14, 15, 16, 17], 6: [18, 19, 20, 21, 22, 23]}
