"""Encoded prompts in curriculum order, this rank's share of them, with a position that can be saved."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from observe_r1.encoding import PromptEncoder
from observe_r1.experience import EncodedPrompt, Prompt, PromptGroup, Skipped, VisionInputs
from observe_r1.ladder.adaptive import AdaptiveCurriculum
from observe_r1.process_lifetime import end_with_parent

Order = Literal["ladder", "random", "adaptive"]
Positions = Sequence[int] | npt.NDArray[np.int64]

logger = logging.getLogger(__name__)


class EncodedDataset(Dataset[EncodedPrompt | Skipped]):
    """A dataset of prompts, encoded where it is read: in the loader's workers."""

    def __init__(self, prompts: Dataset[Prompt | Skipped], encoder: PromptEncoder) -> None:
        self.prompts = prompts
        self.encoder = encoder

    def __getitem__(self, position: int) -> EncodedPrompt | Skipped:
        prompt = self.prompts[position]
        return prompt if isinstance(prompt, Skipped) else self.encoder.encode(prompt)


def curriculum_order(size: int, order: Literal["ladder", "random"], seed: int, epoch: int) -> Positions:
    """Ladder positions in the order of training: as they are, or shuffled anew in every epoch."""
    if order == "ladder":
        return range(size)
    return np.random.default_rng(np.random.SeedSequence([seed, epoch])).permutation(size)


@dataclass
class _Draw:
    """Samples that an adaptive curriculum gave to all ranks at once."""

    positions: list[int] = field(default_factory=list)
    unusable: set[int] = field(default_factory=set)  # those that this rank was given and could not use


class PromptStream:
    """Deals the samples of an epoch to ranks: the n-th goes to rank n mod world, whatever workers there are.

    Args:
        dataset: Encodes the sample at a ladder position.
        size: Samples of an epoch, from the start of the order.
        order: Of training.
        seed: Seed of the random order and of what is drawn.
        workers: Loader processes; 0 encodes in this one.
        rank: Of this process.
        world_size: Number of ranks.
        smallest_share: Minimum over ranks of a number; decides together whether every rank has a prompt.
        sum_over_ranks: Adds a tensor up over all ranks.
        left_over: Samples after the `size` first, which are too few for every rank to have one; they are counted.
        adaptive: Draws the samples of the order `adaptive`.
    """

    def __init__(
        self,
        dataset: EncodedDataset,
        size: int,
        order: Order = "ladder",
        seed: int = 0,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        smallest_share: Callable[[int], int] = lambda number: number,
        sum_over_ranks: Callable[[Tensor], Tensor] = lambda values: values,
        left_over: int = 0,
        adaptive: AdaptiveCurriculum | None = None,
    ) -> None:
        if (order == "adaptive") != (adaptive is not None):
            raise ValueError(f"order is {order!r}: the order adaptive, and no other, needs an adaptive curriculum.")
        self.dataset = dataset
        self.size = size
        self.order = order
        self.seed = seed
        self.workers = workers
        self.rank = rank
        self.world_size = world_size
        self.smallest_share = smallest_share
        self.sum_over_ranks = sum_over_ranks
        self.left_over = left_over
        self.adaptive = adaptive
        self.epoch = 0
        self.position = 0
        self.skipped: Counter[str] = Counter()
        self.examples: dict[str, str] = {}  # the first detail of each reason
        self._reader: Iterator[EncodedPrompt | Skipped] | None = None
        self._sampler = _PositionSampler()
        self._draws: deque[_Draw] = deque()  # whose outcome `observe` has yet to hear of, the oldest first

    @property
    def exhausted(self) -> bool:
        return self.position >= self.size

    def draw(self, count: int) -> list[EncodedPrompt]:
        """This rank's share of the next `count` samples. Draws on where a rank would be left without any prompt.

        Where the ladder ends before every rank has one, no rank gets any: they must all train, or none.
        """
        prompts: list[EncodedPrompt] = []
        if self.adaptive is not None:
            self._draws.append(_Draw())
        while not self.exhausted:
            prompts += self._take(count)
            if self.smallest_share(len(prompts)) > 0:
                return prompts
            count = self.world_size
        if prompts:
            self.skipped["other_ranks_have_none"] += len(prompts)
        return []

    def observe(self, groups: Sequence[PromptGroup]) -> None:
        """Takes in how the oldest draw that was not observed yet has been answered: once for every draw.

        Every rank calls it, with its own groups.
        """
        if self.adaptive is None:
            return
        draw = self._draws.popleft()
        outcome = torch.zeros(len(draw.positions), 3, dtype=torch.float64)  # correct, judged, unusable
        number = {position: place for place, position in enumerate(draw.positions)}
        for group in groups:
            scores = group.scores
            if scores is not None and bool(scores.judged.all()):
                place = number[group.prompt.prompt.position]
                outcome[place, 0] += float(scores.correct.sum())
                outcome[place, 1] += len(scores.correct)
        for position in draw.unusable:
            outcome[number[position], 2] = 1
        correct, total, unusable = self.sum_over_ranks(outcome).numpy().T
        self.adaptive.observe(draw.positions, correct, total, unusable)

    def next_epoch(self) -> None:
        """Starts the ladder again."""
        if self.rank == 0 and self.left_over and self.position:
            self.skipped["fewer_than_ranks"] += self.left_over
        self.epoch, self.position, self._reader = self.epoch + 1, 0, None

    def encode(self, position: int) -> EncodedPrompt | Skipped:
        """The sample at a ladder position, outside of the order."""
        return self.dataset[position]

    def state_dict(self) -> dict[str, Any]:
        state = {"epoch": self.epoch, "position": self.position, "skipped": dict(self.skipped)}
        if self.adaptive is None:
            return state
        # draws of rollouts that are being sampled ahead: their outcome is yet to come
        draws = [{"positions": list(draw.positions), "unusable": sorted(draw.unusable)} for draw in self._draws]
        return {**state, "adaptive": self.adaptive.state_dict(), "draws": draws}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.position, self._reader = state["epoch"], state["position"], None
        self.skipped = Counter(state["skipped"])
        self._draws.clear()
        if self.adaptive is not None and "adaptive" in state:
            self.adaptive.load_state_dict(state["adaptive"])
            self._draws += [_Draw(list(draw["positions"]), set(draw["unusable"])) for draw in state["draws"]]

    def _take(self, count: int) -> list[EncodedPrompt]:
        end = min(self.position + count, self.size)
        numbers = range(self.position + (self.rank - self.position) % self.world_size, end, self.world_size)
        if self.adaptive is not None:
            drawn = self.adaptive.draw(end - self.position, (self.seed, self.epoch, self.position))
            end = self.position + len(drawn) if drawn else self.size  # nothing is left that can be used
            self._draws[-1].positions += drawn
            self._reader = self._read(drawn[(self.rank - self.position) % self.world_size :: self.world_size])
            numbers = range(numbers.start, end, self.world_size) if drawn else range(0)
        elif self._reader is None:
            self._reader = self._read(self._order()[numbers.start : self.size : self.world_size])
        taken: list[EncodedPrompt] = []
        for _ in numbers:
            sample = next(self._reader)
            if isinstance(sample, Skipped):
                if not self.skipped[sample.reason]:
                    self.examples[sample.reason] = sample.detail
                    logger.warning("skipping sample %d: %s (%s)", sample.position, sample.reason, sample.detail)
                self.skipped[sample.reason] += 1
                if self.adaptive is not None:
                    self._draws[-1].unusable.add(sample.position)
            else:
                taken.append(_owned(sample) if self.workers else sample)
        self.position = end
        return taken

    def _order(self) -> Positions:
        assert self.order != "adaptive", "its samples are drawn, not ordered"
        # of all samples: how many are left over depends on the number of ranks, and the order must not
        return curriculum_order(self.size + self.left_over, self.order, self.seed, self.epoch)

    def _read(self, positions: Positions) -> Iterator[EncodedPrompt | Skipped]:
        self._sampler.positions = positions
        return iter(self._loader)

    @cached_property
    def _loader(self) -> DataLoader[EncodedPrompt | Skipped]:
        return DataLoader(
            self.dataset,
            batch_size=None,
            sampler=self._sampler,
            num_workers=self.workers,
            # a generator of its own: the loader would take a seed from the global one, and a resumed run one more
            generator=torch.Generator(),
            worker_init_fn=_end_with_parent,
            # what is drawn for one rollout does not say what comes next: the same processes go on with it
            persistent_workers=self.workers > 0 and self.adaptive is not None,
        )


class _PositionSampler(Sampler[int]):
    """Ladder positions to be read, which may be replaced between two passes of a loader."""

    def __init__(self) -> None:
        self.positions: Positions = ()

    def __iter__(self) -> Iterator[int]:
        return map(int, self.positions)

    def __len__(self) -> int:
        return len(self.positions)


def _owned(prompt: EncodedPrompt) -> EncodedPrompt:
    """A copy in this process's own memory: what a worker sends holds a file descriptor for every tensor."""
    vision = prompt.vision
    return dataclasses.replace(
        prompt,
        token_ids=prompt.token_ids.clone(),
        mm_token_type_ids=prompt.mm_token_type_ids.clone(),
        vision=vision and VisionInputs(vision.pixel_values.clone(), vision.image_grid_thw.clone()),
    )


def _end_with_parent(worker: int) -> None:
    """Blocked on a full pipe, a worker would stay forever when its parent is killed."""
    end_with_parent()
