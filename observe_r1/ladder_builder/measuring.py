"""Rollouts over a list of questions, block by block, each block kept as soon as it is finished."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse.typing import final
from lightning.pytorch.callbacks import BasePredictionWriter
from torch.utils.data import DataLoader, Dataset

from observe_r1.datamodules.prompt_stream import EncodedDataset
from observe_r1.encoding import PromptEncoder, PromptOptions
from observe_r1.experience import EncodedPrompt, Prompt, PromptGroup, Sealed, Skipped
from observe_r1.ladder.journal import BlockJournal, BlockWriter
from observe_r1.ladder.reader import LadderDataset
from observe_r1.loading import PolicyOptions
from observe_r1.module import ObserveR1
from observe_r1.objective import KLOptions
from observe_r1.rewards import AccuracyReward
from observe_r1.rollout import RolloutEngine, SamplingOptions


@final
class BuildTrainer(L.Trainer):
    """Lightning's Trainer."""


@dataclass
class Rollouts:
    """Who answers the questions, and how.

    Args:
        policy: The model.
        prompt: How questions become prompts.
        sampling: How answers are sampled; `group_size` is N, the number of answers to each question.
        rollout: The engine that samples; null: the model itself.
        accuracy: The reward that decides what is correct; null: `AccuracyReward` as it is.
    """

    policy: PolicyOptions
    prompt: PromptOptions = PromptOptions()
    sampling: SamplingOptions = SamplingOptions()
    rollout: RolloutEngine | None = None
    accuracy: AccuracyReward | None = None

    def module(self, seed: int) -> ObserveR1:
        """Answers questions under `Trainer.predict`."""
        return ObserveR1(
            policy=self.policy,
            prompt=self.prompt,
            sampling=self.sampling,
            rewards={"accuracy": self.accuracy or AccuracyReward()},
            rollout=self.rollout,
            kl=KLOptions(coefficient=0.0),  # no reference model
            prediction="sampled",
            seed=seed,
        )

    def settings(self, seed: int) -> dict[str, Any]:
        """What the answers depend on, as JSON."""
        return {
            "policy": asdict(self.policy),
            "prompt": asdict(self.prompt),
            "sampling": asdict(self.sampling),
            "engine": None if self.rollout is None else type(self.rollout).__name__,
            "accuracy": None if self.accuracy is None else type(self.accuracy).__name__,
            "seed": seed,
        }


class Questions(Dataset[Prompt | Skipped]):
    """The questions of several ladders, by their position in all of them.

    Args:
        tars: Shards in order.
        instruction: Asked for at the end of the question, in the place of what the system message asks for; None
            leaves the prompts as they are.
    """

    def __init__(self, tars: Sequence[Path], instruction: str | None = None) -> None:
        self.ladder = LadderDataset(tars)
        self.instruction = instruction

    def __len__(self) -> int:
        return len(self.ladder)

    def __getitem__(self, position: int) -> Prompt | Skipped:
        prompt = self.ladder[position]
        if self.instruction is None or isinstance(prompt, Skipped):
            return prompt
        return asked_directly(prompt, self.instruction)


def asked_directly(prompt: Prompt, instruction: str) -> Prompt:
    """The prompt without system messages, its last message followed by an instruction."""
    messages = [message for message in prompt.messages if message["role"] != "system"]
    content = messages[-1]["content"]
    items = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    messages[-1] = {**messages[-1], "content": [*items, {"type": "text", "text": f"\n{instruction}"}]}
    return dataclasses.replace(prompt, messages=messages)


class Block(Sealed[list[EncodedPrompt]]):
    """Questions that are answered together; their answers depend on nothing outside of the block."""

    def __init__(self, number: int, prompts: list[EncodedPrompt], skipped: list[Skipped]) -> None:
        super().__init__(prompts)
        self.number = number
        self.skipped = skipped


class BlockLoader:
    """Some blocks of questions, encoded."""

    def __init__(
        self, questions: Questions, encoder: PromptEncoder, blocks: dict[int, Sequence[int]], workers: int
    ) -> None:
        self.dataset = EncodedDataset(questions, encoder)
        self.blocks = blocks
        self.workers = workers

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[Block]:
        positions = [position for block in self.blocks.values() for position in block]
        samples = iter(DataLoader(self.dataset, batch_size=None, sampler=positions, num_workers=self.workers))
        for number, block in self.blocks.items():
            content = [next(samples) for _ in block]
            prompts = [sample for sample in content if isinstance(sample, EncodedPrompt)]
            yield Block(number, prompts, [sample for sample in content if isinstance(sample, Skipped)])


class QuestionBlocks(L.LightningDataModule):
    """The blocks that a journal lacks, dealt to the ranks; a block is the same whoever answers it."""

    def __init__(
        self, questions: Questions, positions: Sequence[int], size: int, workers: int, journal: BlockJournal
    ) -> None:
        super().__init__()
        self.questions = questions
        self.positions = positions
        self.size = size
        self.workers = workers
        self.journal = journal

    def predict_dataloader(self) -> BlockLoader:
        trainer = self.trainer
        assert trainer is not None
        module = trainer.lightning_module
        assert isinstance(module, ObserveR1)
        trainer.strategy.barrier()  # all ranks look before any of them writes
        pending = self.journal.pending()
        trainer.strategy.barrier()
        # a rank without work would leave the others waiting: it repeats a block, which changes nothing
        mine = pending[trainer.global_rank :: trainer.world_size] or pending[:1]
        blocks = {number: self.positions[number * self.size : (number + 1) * self.size] for number in mine}
        return BlockLoader(self.questions, module.encoder, blocks, self.workers)


class MeasurementWriter(BasePredictionWriter):
    """Keeps every block of judged answers in a journal as soon as it is finished.

    Args:
        journal: Of the stage.
        keep_completions: Keep the texts too.
    """

    def __init__(self, journal: BlockJournal, keep_completions: bool) -> None:
        super().__init__(write_interval="batch")
        self.journal = journal
        self.keep_completions = keep_completions
        self._writer: BlockWriter | None = None

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._writer = self.journal.writer(trainer.global_rank)

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Sealed[list[PromptGroup]],
        batch_indices: Sequence[int] | None,
        batch: Block,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        records: list[dict[str, Any]] = [
            {"position": sample.position, "reason": sample.reason, "detail": sample.detail} for sample in batch.skipped
        ]
        records += [self._record(group) for group in prediction.content]
        assert self._writer is not None
        self._writer.write(batch.number, sorted(records, key=lambda record: record["position"]))

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self._writer is not None
        self._writer.close()
        trainer.strategy.barrier()

    def _record(self, group: PromptGroup) -> dict[str, Any]:
        assert group.scores is not None
        position = group.prompt.prompt.position
        if not bool(group.scores.judged.all()):
            return {"position": position, "reason": "gold_unparseable", "detail": "no answer could be judged"}
        record = {
            "position": position,
            "n_correct": int(group.scores.correct.sum()),
            "lengths": [len(completion) for completion in group.completions],
            "truncated": sum(completion.truncated for completion in group.completions),
        }
        if self.keep_completions:
            record["completions"] = [completion.text for completion in group.completions]
        return record


@dataclass(frozen=True)
class MeasuringOptions:
    """How questions are put to a policy; see `build_ladder`."""

    seed: int
    questions_per_block: int
    workers: int
    keep_completions: bool


def measure(
    directory: Path,
    settings: dict[str, Any],
    questions: Questions,
    positions: Sequence[int],
    rollouts: Rollouts,
    trainer: L.Trainer,
    options: MeasuringOptions,
) -> BlockJournal:
    """The finished journal of answers to the questions at these positions; continues where it was interrupted."""
    listed = hashlib.sha256(json.dumps(list(positions)).encode()).hexdigest()
    size = options.questions_per_block
    settings = {**settings, **rollouts.settings(options.seed), "precision": str(trainer.precision)}
    settings |= {"questions": listed, "questions_per_block": size}
    journal = BlockJournal(directory, settings, -(-len(positions) // size))
    if journal.pending():
        writer = MeasurementWriter(journal, options.keep_completions)
        trainer.callbacks.append(writer)  # type: ignore[attr-defined]
        blocks = QuestionBlocks(questions, positions, size, options.workers, journal)
        try:
            trainer.predict(rollouts.module(options.seed), datamodule=blocks, return_predictions=False)
        finally:
            trainer.callbacks.remove(writer)  # type: ignore[attr-defined]
    finish(journal, trainer.global_rank)
    return journal


def finish(journal: BlockJournal, rank: int) -> None:
    """Rank 0 closes the journal; the others wait until it is."""
    if rank == 0:
        journal.finish()
    while not journal.is_finished:
        time.sleep(0.2)
