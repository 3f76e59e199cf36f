"""The data module: streams a NeuraLadder of WebDataset shards in curriculum order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import lightning as L
import numpy as np
import numpy.typing as npt
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from observe_r1.datamodules.prompt_stream import EncodedDataset, Order, PromptStream
from observe_r1.datamodules.rollout_loader import RolloutLoader
from observe_r1.datamodules.training_checks import check_training
from observe_r1.experience import EncodedPrompt, Sealed
from observe_r1.ladder.adaptive import AdaptiveCurriculum, AdaptiveOptions
from observe_r1.ladder.images import DEFAULT_MAX_PIXELS
from observe_r1.ladder.reader import LadderDataset
from observe_r1.ladder.storage import RemoteOptions
from observe_r1.metrics import level_of
from observe_r1.module import ObserveR1
from observe_r1.ranks import over_ranks, smallest_over_ranks, sum_over_ranks
from observe_r1.redistribution import redistribute, redistribute_started


class NeuraLadderDataModule(L.LightningDataModule):
    """Prompts from the shards of a ladder, rollouts for training, batches of questions for validation.

    Args:
        ladder: Directory, glob or tar with the training samples, on a local disk or behind a URL that fsspec knows.
        held_out: Directory, glob or tar with the questions of the validation; null for none.
        prompts_per_rollout: Prompts of one rollout, over all ranks (paper: 128).
        order: `ladder` trains from easy to hard as the ladder is built; `random` shuffles anew in every epoch;
            `adaptive` draws every rollout by current pass rates, with replacement between rollouts.
        workers: Processes that read and encode ahead; 0 does it in the training process.
        questions_per_batch: Held-out questions answered at the same time on one rank.
        max_image_pixels: Images with more pixels than this are skipped before they are decoded.
        missing_shards: `error` refuses a ladder whose tars are not all there, and ends a run that cannot reach one;
            `skip` counts their samples as skipped.
        remote: How shards behind a URL are read and kept.
        adaptive: How the order `adaptive` estimates pass rates.
        seed: Seed of the random order and of what is drawn. The command line sets it from `seed_everything`.
    """

    def __init__(
        self,
        ladder: str,
        held_out: str | None = None,
        prompts_per_rollout: int = 128,
        order: Order = "ladder",
        workers: int = 2,
        questions_per_batch: int = 64,
        max_image_pixels: int = DEFAULT_MAX_PIXELS,
        missing_shards: Literal["error", "skip"] = "error",
        remote: RemoteOptions = RemoteOptions(),
        adaptive: AdaptiveOptions = AdaptiveOptions(),
        seed: int = 0,
    ) -> None:
        super().__init__()
        at_least = {"prompts_per_rollout": 1, "workers": 0, "questions_per_batch": 1, "max_image_pixels": 1}
        given = (prompts_per_rollout, workers, questions_per_batch, max_image_pixels)
        for (name, least), value in zip(at_least.items(), given, strict=True):
            if value < least:
                raise ValueError(f"data.{name} is {value}, but it must be at least {least}.")
        self.ladder = ladder
        self.held_out = held_out
        self.prompts_per_rollout = prompts_per_rollout
        self.order: Order = order
        self.workers = workers
        self.questions_per_batch = questions_per_batch
        self.max_image_pixels = max_image_pixels
        self.missing_shards: Literal["error", "skip"] = missing_shards
        self.remote = remote
        self.adaptive = adaptive
        self.seed = seed
        self._datasets: dict[str, LadderDataset] = {}
        self._loader: RolloutLoader | None = None
        self._question_stream: PromptStream | None = None
        self._saved: list[dict[str, Any] | None] | None = None

    # ---- training ---------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> RolloutLoader:
        if self._loader is None or self._loader.module is not self._module:
            world_size = self._trainer.world_size
            micro_batches = self._trainer.accumulate_grad_batches
            check_training(self._module, self.prompts_per_rollout, world_size, micro_batches)
            samples = len(self._dataset(self.ladder))
            if samples < world_size:
                raise ValueError(
                    f"data.ladder {self.ladder!r} has {samples} samples, and every rank ({world_size}) needs one: "
                    f"`observe-r1 ladder inspect {self.ladder}` shows what it holds."
                )
            # too few for every rank to have one
            left_over = samples % self.prompts_per_rollout
            left_over = left_over if left_over < world_size else 0
            stream = self._stream(self.ladder, self.order, samples - left_over, left_over)
            device = self._trainer.strategy.root_device  # where the module is yet to be
            stream.smallest_share = partial(smallest_over_ranks, device=device)
            stream.sum_over_ranks = partial(sum_over_ranks, device=device)
            origin = {"data.order": self.order, "the number of samples": samples}
            origin |= {"the checksum of the ladder": self._dataset(self.ladder).fingerprint}
            origin |= {} if self.order == "ladder" else {"data.seed": self.seed}
            self._loader = RolloutLoader(self._module, stream, self.prompts_per_rollout, origin)
            self._restore_loader()
        return self._loader

    def largest_prompt(self, inspected: int) -> EncodedPrompt | None:
        """The prompt of the ladder that costs most to train on, among some that are read; None if all of them are bad.

        Bad samples are passed over and counted nowhere: they are not drawn.

        Args:
            inspected: Samples that are read: a quarter of them the largest in bytes, the others from all of the ladder.
        """
        dataset, cost = self._dataset(self.ladder), self._module.policy.token_cost()

        def prompt_cost(prompt: EncodedPrompt) -> tuple[float, int]:
            tokens = prompt.token_ids.numel()
            return cost.prompt(tokens, prompt.tower_patches), tokens

        encoded = EncodedDataset(dataset, self._module.encoder)
        samples = (encoded[position] for position in positions_to_inspect(dataset.stored_bytes, inspected))
        return max((sample for sample in samples if isinstance(sample, EncodedPrompt)), key=prompt_cost, default=None)

    # ---- held-out questions -----------------------------------------------------------------------------------------

    def val_dataloader(self) -> QuestionLoader | NoQuestions | list[Any]:
        if self.held_out is not None:
            return self._questions(self.held_out)
        if self._trainer.state.fn == TrainerFn.VALIDATING:
            rank_zero_warn("data.held_out is not set: `validate` asks the benchmarks of callbacks, and nothing else.")
        return NoQuestions() if self._trainer.state.fn == TrainerFn.VALIDATING else []

    def test_dataloader(self) -> QuestionLoader:
        return self._questions(self._needed_held_out("test"))

    def predict_dataloader(self) -> QuestionLoader:
        return self._questions(self._needed_held_out("predict"))

    def _needed_held_out(self, command: str) -> str:
        if self.held_out is None:
            raise ValueError(f"`{command}` needs data.held_out: a directory, glob or tar with the questions.")
        return self.held_out

    def _questions(self, ladder: str) -> QuestionLoader:
        if len(self._dataset(ladder)) < self._trainer.world_size:
            raise ValueError(f"{ladder!r} has fewer questions than there are ranks ({self._trainer.world_size}).")
        self._question_stream = self._stream(ladder, "ladder", len(self._dataset(ladder)))
        return QuestionLoader(self._question_stream, self.questions_per_batch)

    # ---- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        mine = None if self._loader is None else self._loader.save()
        return {"ranks": over_ranks(mine)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # only kept: a checkpoint may also be validated, on any number of ranks
        self._saved = state_dict["ranks"]
        if self._loader is not None:
            self._restore_loader()

    def _restore_loader(self) -> None:
        if self._saved is None:
            return
        if len(self._saved) != self._trainer.world_size:
            self._saved = for_other_ranks(self._saved, self._trainer.world_size)
        mine = self._saved[self._trainer.global_rank]
        self._saved = None
        if mine is not None and self._loader is not None:
            self._loader.restore(mine)

    def on_exception(self, exception: BaseException) -> None:
        if self._trainer.lightning_module is not None:
            self._module.close()

    def skipped(self) -> dict[str, dict[str, int]]:
        """Samples that could not be used, by reason: of the training so far, and of one pass over the held-out ones.

        Adds up over ranks, so all of them have to call it.
        """
        mine = {
            "train": Counter() if self._loader is None else self._loader.stream.skipped,
            "held_out": Counter() if self._question_stream is None else self._question_stream.skipped,
        }
        ranks = over_ranks(mine)
        return {split: dict(sum((rank[split] for rank in ranks), Counter())) for split in mine}

    def describe(self) -> str:
        """The training samples and the held-out ones, in a line."""
        dataset = self._dataset(self.ladder)
        levels = {level_of(difficulty) for difficulty in dataset.difficulties} - {None}
        known = f"{len(levels)} levels of difficulty" if levels else "difficulty unknown"
        held_out = "none" if self.held_out is None else f"{len(self._dataset(self.held_out)):,}"
        return f"{len(dataset):,} from {self.ladder}, {known}, order {self.order}; {held_out} held out"

    def shard_problems(self) -> dict[str, dict[str, int]]:
        """Shards by what is wrong with them, of each ladder that has any."""
        return {ladder: dict(dataset.problems) for ladder, dataset in self._datasets.items() if dataset.problems}

    # ---- parts ------------------------------------------------------------------------------------------------------

    @property
    def _trainer(self) -> L.Trainer:
        assert self.trainer is not None, "the data module belongs to a trainer"
        return self.trainer

    @property
    def _module(self) -> ObserveR1:
        module = self._trainer.lightning_module
        if not isinstance(module, ObserveR1):
            raise ValueError(f"{type(self).__name__} works with ObserveR1, not with {type(module).__name__}.")
        return module

    def _dataset(self, ladder: str) -> LadderDataset:
        if ladder not in self._datasets:
            try:
                self._datasets[ladder] = LadderDataset(
                    ladder,
                    max_image_pixels=self.max_image_pixels,
                    missing_shards=self.missing_shards,
                    remote=self.remote,
                )
            except ValueError as error:
                raise ValueError(f"data.{'held_out' if ladder == self.held_out else 'ladder'}: {error}") from error
        return self._datasets[ladder]

    def _stream(self, ladder: str, order: Order, size: int, left_over: int = 0) -> PromptStream:
        dataset = self._dataset(ladder)
        adaptive = AdaptiveCurriculum(dataset.difficulty_array, self.adaptive) if order == "adaptive" else None
        return PromptStream(
            EncodedDataset(dataset, self._module.encoder),
            size,
            order,
            self.seed,
            self.workers,
            self._trainer.global_rank,
            self._trainer.world_size,
            left_over=left_over,
            adaptive=adaptive,
        )


def for_other_ranks(saved: Sequence[dict[str, Any] | None], world_size: int) -> list[dict[str, Any] | None]:
    """The state of the loaders of `world_size` ranks, from those of another number of ranks.

    The stream stands at the same place of the same order, so nothing is lost or seen twice. A rollout of which some
    optimizer steps are yet to come is dealt out again, and so is one that was sampled ahead.

    Raises:
        ValueError: The checkpoint was saved in the middle of an optimizer step.
    """
    states = [state for state in saved if state is not None]
    if len(states) < len(saved):
        return [None] * world_size
    first = states[0]
    skipped = dict(sum((Counter(state["stream"]["skipped"]) for state in states), Counter()))
    experiences: list[dict[str, Any] | None] = [None] * world_size
    if first["experience"] is not None:
        if first["next_micro_batch"] % len(first["experience"]["steps"][0]["micro_batches"]):
            raise ValueError(
                f"The checkpoint was saved by {len(saved)} ranks in the middle of an optimizer step and this run has "
                f"{world_size}: resume on {len(saved)} ranks, or from a checkpoint between two steps."
            )
        experiences = [*redistribute([state["experience"] for state in states], world_size)]
    begun = zip(*(state.get("ahead", ()) for state in states), strict=True)
    ahead = [redistribute_started(of_ranks, world_size) for of_ranks in begun]
    # what ranks counted apart, the first one goes on with
    streams: list[dict[str, Any]] = [
        {**first["stream"], "skipped": {} if rank else skipped} for rank in range(world_size)
    ]
    for number, draw in enumerate(first["stream"].get("draws", ())):
        unusable = sorted({sample for state in states for sample in state["stream"]["draws"][number]["unusable"]})
        for rank, stream in enumerate(streams):
            stream["draws"] = [*stream["draws"]]
            stream["draws"][number] = {**draw, "unusable": [] if rank else unusable}
    return [
        {**first, "stream": streams[rank], "experience": experiences[rank], "ahead": [dealt[rank] for dealt in ahead]}
        for rank in range(world_size)
    ]


def positions_to_inspect(stored_bytes: npt.NDArray[np.int64], count: int) -> list[int]:
    """At most `count` positions with something stored: a quarter of them the largest, the rest spread evenly."""
    present = np.flatnonzero(stored_bytes)
    by_size = present[np.argsort(-stored_bytes[present], kind="stable")]
    largest, others = np.split(by_size, [-(-count // 4)])
    spread = min(count - len(largest), len(others))
    chosen = np.sort(others)[[number * len(others) // spread for number in range(spread)]] if spread else others[:0]
    return [*largest.tolist(), *chosen.tolist()]


class QuestionLoader:
    """Batches of encoded questions in order, this rank's share of them; bad samples are counted and left out."""

    def __init__(self, stream: PromptStream, batch_size: int) -> None:
        self.stream = stream
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-self.stream.size // (self.batch_size * self.stream.world_size))

    def __iter__(self) -> Iterator[Sealed[list[EncodedPrompt]]]:
        self.stream.next_epoch()
        self.stream.skipped.clear()
        while not self.stream.exhausted:
            batch = self.stream.draw(self.batch_size * self.stream.world_size)
            if batch or self.stream.world_size > 1:  # where weights are sharded, every rank has to answer equally often
                yield Sealed(batch)


class NoQuestions:
    """One empty batch: without any, the command `validate` would not call its callbacks, which may have benchmarks."""

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Sealed[list[EncodedPrompt]]]:
        yield Sealed([])
