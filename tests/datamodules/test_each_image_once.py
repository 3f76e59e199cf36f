"""Host side of a rollout: every image is read, decoded and processed once, and its pixels exist once."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from observe_r1.collection import UpdateOptions
from observe_r1.datamodules import NeuraLadderDataModule
from observe_r1.encoding import PromptOptions
from observe_r1.experience import MicroBatch, Sealed
from observe_r1.ladder.reader import LadderDataset
from observe_r1.loading import PolicyOptions
from observe_r1.model_inputs import takes_image_features
from observe_r1.module import ObserveR1
from observe_r1.objective import KLOptions
from observe_r1.rollout import SamplingOptions


class PixelBuffers(L.Callback):
    """Where the pixels of each prompt lie, over all micro-batches."""

    def __init__(self) -> None:
        self.addresses: defaultdict[int, set[int]] = defaultdict(set)
        self.patches: Counter[str] = Counter()  # through the vision tower

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, ObserveR1)
        tower = pl_module.policy.model.model.visual
        tower.register_forward_pre_hook(lambda _, args: self.patches.update(patches=len(args[0])))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(batch, Sealed)
        assert isinstance(batch.content, MicroBatch)
        for part in batch.content.slices:
            assert part.prompt.vision is not None
            self.addresses[part.prompt.prompt.position].add(part.prompt.vision.pixel_values.data_ptr())


@pytest.mark.parametrize("frozen", [False, True])
def test_once_whatever_group_size_accumulation_and_epochs(
    tiny_ladder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frozen: bool
) -> None:
    read: Counter[int] = Counter()
    processed: list[int] = []
    original = LadderDataset.__getitem__

    def counted(dataset: LadderDataset, position: int) -> Any:
        read[position] += 1
        return original(dataset, position)

    monkeypatch.setattr(LadderDataset, "__getitem__", counted)
    buffers = PixelBuffers()
    module = ObserveR1(
        PolicyOptions("quickstart", gradient_checkpointing=False, freeze=["*visual*"] if frozen else []),
        PromptOptions(system_prompt=None),
        SamplingOptions(group_size=4, max_new_tokens=8),
        kl=KLOptions(0.01),  # with a reference model; nothing is left out of the forward
        updates=UpdateOptions(steps_per_rollout=2, epochs_per_rollout=2),
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=4,  # one rollout
        accumulate_grad_batches=3,
        callbacks=[buffers],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    data = NeuraLadderDataModule(str(tiny_ladder), prompts_per_rollout=8, workers=0)
    data.setup = lambda stage: _count_images(module, processed)  # type: ignore[method-assign]
    trainer.fit(module, data)
    assert dict(read) == dict.fromkeys(range(8), 1)
    assert processed == [1] * 8
    assert sorted(buffers.addresses) == list(range(8))
    assert all(len(addresses) == 1 for addresses in buffers.addresses.values())
    patches_of_an_image = 64
    # from transformers 5.18 on models take features
    if frozen and takes_image_features(
        module.policy.transformer.model
    ):  # for generation, old, reference and all training passes together
        assert buffers.patches["patches"] == 8 * patches_of_an_image


def _count_images(module: ObserveR1, processed: list[int]) -> None:
    """Notes the number of images in every call of the image processor."""
    configure = module.configure_model

    def configured() -> None:
        configure()
        processor = module.encoder.processor.image_processor
        kind = type(processor)

        class Counted(kind):  # type: ignore[misc,valid-type]
            def __call__(self, images: Any, *args: Any, **options: Any) -> Any:
                processed.append(len(images))
                return super().__call__(images, *args, **options)

        processor.__class__ = Counted

    module.configure_model = configured  # type: ignore[method-assign]
