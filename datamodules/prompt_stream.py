"""Encoded prompts in curriculum order, this rank's share of them, with a position that can be saved."""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from observe_r1.encoding import PromptEncoder
from observe_r1.experience import EncodedPrompt, Prompt, Skipped, VisionInputs

Order = Literal["ladder", "random"]

logger = logging.getLogger(__name__)


class EncodedDataset(Dataset[EncodedPrompt | Skipped]):
    """A dataset of prompts, encoded where it is read: in the loader's workers."""

    def __init__(self, prompts: Dataset[Prompt | Skipped], encoder: PromptEncoder) -> None:
        self.prompts = prompts
        self.encoder = encoder

    def __getitem__(self, position: int) -> EncodedPrompt | Skipped:
        prompt = self.prompts[position]
        return prompt if isinstance(prompt, Skipped) else self.encoder.encode(prompt)


def curriculum_order(size: int, order: Order, seed: int, epoch: int) -> Sequence[int]:
    """Ladder positions in the order of training: as they are, or shuffled anew in every epoch."""
    if order == "ladder":
        return range(size)
    return [int(n) for n in np.random.default_rng(np.random.SeedSequence([seed, epoch])).permutation(size)]


class PromptStream:
    """Deals the samples of an epoch to ranks: the n-th goes to rank n mod world, whatever workers there are.

    Args:
        dataset: Encodes the sample at a ladder position.
        size: Samples of an epoch, from the start of the order.
        order: Of training.
        seed: Seed of the random order.
        workers: Loader processes; 0 encodes in this one.
        rank: Of this process.
        world_size: Number of ranks.
        smallest_share: Minimum over ranks of a number; decides together whether every rank has a prompt.
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
    ) -> None:
        self.dataset = dataset
        self.size = size
        self.order = order
        self.seed = seed
        self.workers = workers
        self.rank = rank
        self.world_size = world_size
        self.smallest_share = smallest_share
        self.epoch = 0
        self.position = 0
        self.skipped: Counter[str] = Counter()
        self.examples: dict[str, str] = {}  # the first detail of each reason
        self._reader: Iterator[EncodedPrompt | Skipped] | None = None

    @property
    def exhausted(self) -> bool:
        return self.position >= self.size

    def draw(self, count: int) -> list[EncodedPrompt]:
        """This rank's share of the next `count` samples. Draws on where a rank would be left without any prompt.

        Where the ladder ends before every rank has one, no rank gets any: they must all train, or none.
        """
        prompts: list[EncodedPrompt] = []
        while not self.exhausted:
            prompts += self._take(count)
            if self.smallest_share(len(prompts)) > 0:
                return prompts
            count = self.world_size
        if prompts:
            self.skipped["other_ranks_have_none"] += len(prompts)
        return []

    def next_epoch(self) -> None:
        """Starts the ladder again."""
        self.epoch, self.position, self._reader = self.epoch + 1, 0, None

    def encode(self, position: int) -> EncodedPrompt | Skipped:
        """The sample at a ladder position, outside of the order."""
        return self.dataset[position]

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position, "skipped": dict(self.skipped)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.position, self._reader = state["epoch"], state["position"], None
        self.skipped = Counter(state["skipped"])

    def _take(self, count: int) -> list[EncodedPrompt]:
        end = min(self.position + count, self.size)
        reader = self._reader or self._read_from(self.position)
        self._reader = reader
        taken: list[EncodedPrompt] = []
        for number in range(self.position, end):
            if number % self.world_size != self.rank:
                continue
            sample = next(reader)
            if isinstance(sample, Skipped):
                if not self.skipped[sample.reason]:
                    self.examples[sample.reason] = sample.detail
                    logger.warning("skipping sample %d: %s (%s)", sample.position, sample.reason, sample.detail)
                self.skipped[sample.reason] += 1
            else:
                taken.append(_owned(sample) if self.workers else sample)
        self.position = end
        return taken

    def _read_from(self, start: int) -> Iterator[EncodedPrompt | Skipped]:
        order = curriculum_order(self.size, self.order, self.seed, self.epoch)
        mine = [order[number] for number in range(start, self.size) if number % self.world_size == self.rank]
        # a generator of its own: the loader would take a seed from the global one, and a resumed run one more
        generator = torch.Generator()
        loader = DataLoader(
            self.dataset,
            batch_size=None,
            sampler=mine,
            num_workers=self.workers,
            generator=generator,
            worker_init_fn=_end_with_parent,
        )
        return iter(loader)


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
    """Asks Linux to end this worker when its parent is killed: blocked on a full pipe, it would stay forever."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG in prctl(2)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
