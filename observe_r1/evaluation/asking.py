"""Asks a rollout engine the questions of a benchmark, block by block, whatever the number of ranks."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from observe_r1.answers import is_well_formed
from observe_r1.encoding import PromptEncoder
from observe_r1.evaluation.benchmark import Benchmark
from observe_r1.evaluation.item import Judgement, Outcome, Verdict
from observe_r1.evaluation.predictions import Header, Prediction
from observe_r1.experience import Completion, EncodedPrompt, Skipped
from observe_r1.rollout.base import RolloutEngine, SamplingOptions


def spread(count: int, wanted: int | None) -> list[int]:
    """Positions of `wanted` questions spread evenly over `count`; all of them for None or more than there are."""
    if wanted is None or wanted >= count:
        return list(range(count))
    return [number * count // wanted for number in range(wanted)]


def blocks_of(positions: Sequence[int], size: int) -> list[list[int]]:
    """The questions that are asked in one call. They do not depend on ranks, so neither does any response."""
    return [list(positions[start : start + size]) for start in range(0, len(positions), size)]


def share(blocks: Sequence[list[int]], rank: int, world_size: int) -> list[list[int]]:
    """The blocks of a rank. Every rank gets as many, as sharded models need it: short shares repeat a block."""
    rounds = -(-len(blocks) // world_size)
    return [blocks[(turn * world_size + rank) % len(blocks)] for turn in range(rounds)]


@dataclass(frozen=True)
class Asking:
    """Who is asked, and how.

    Args:
        engine: With the weights that are to be evaluated.
        encoder: Makes prompts of questions, with the system prompt of the training.
        sampling: One response each; temperature 0 is greedy.
        seed: Of the sampling.
    """

    engine: RolloutEngine
    encoder: PromptEncoder
    sampling: SamplingOptions
    seed: int = 0

    def header(self, benchmark: Benchmark, questions: int, **circumstances: str | int) -> Header:
        """What makes responses comparable; the circumstances are what the caller knows of that."""
        asked = {
            **circumstances,
            "engine": type(self.engine).__qualname__,
            "sampling": dataclasses.asdict(self.sampling),
            "seed": self.seed,
            "prompt": dataclasses.asdict(self.encoder.options),
        }
        kind = type(benchmark)
        return Header(f"{kind.__module__}.{kind.__qualname__}", benchmark.name, questions, asked)

    def ask(self, benchmark: Benchmark, positions: Sequence[int]) -> list[Prediction]:
        """Responses to the questions at these positions, judged. A question that cannot be asked counts as wrong."""
        try:
            encoded = [self._encode(benchmark, position) for position in positions]
        except Exception:
            self.sit_out()
            raise
        prompts = [prompt for prompt in encoded if isinstance(prompt, EncodedPrompt)]
        groups = iter(self.engine.take_part(prompts, self.sampling, (self.seed + positions[0]) % 2**63))
        return [
            _refused(benchmark, position, prompt)
            if isinstance(prompt, Skipped)
            else _answered(benchmark, position, prompt, next(groups)[0])
            for position, prompt in zip(positions, encoded, strict=True)
        ]

    def sit_out(self) -> None:
        """Asks nothing, once, while other ranks ask."""
        self.engine.take_part([], self.sampling, self.seed)

    def asks_as_before(self, benchmark: Benchmark, earlier: Prediction) -> bool:
        """Whether the model would read the same now; the prompts of a benchmark may have been changed in its code."""
        prompt = self._encode(benchmark, earlier.position)
        return earlier.prompt_hash == ("" if isinstance(prompt, Skipped) else prompt_hash(prompt))

    def _encode(self, benchmark: Benchmark, position: int) -> EncodedPrompt | Skipped:
        try:
            prompt = benchmark.prompt(position)
        except ValueError as error:
            return Skipped(position, "question_refused", str(error))
        return self.encoder.encode(prompt)


def _answered(benchmark: Benchmark, position: int, prompt: EncodedPrompt, completion: Completion) -> Prediction:
    item = benchmark.items[position]
    return Prediction(
        item=item,
        position=position,
        prompt_hash=prompt_hash(prompt),
        response=completion.text,
        tokens=len(completion),
        truncated=completion.truncated,
        well_formed=is_well_formed(completion.text),
        verdict=benchmark.judge(item, completion.text),
    )


def _refused(benchmark: Benchmark, position: int, why: Skipped) -> Prediction:
    nothing = Judgement(Outcome.WRONG, None)
    reason = f"{why.reason}: {why.detail}"
    return Prediction(
        benchmark.items[position], position, "", "", 0, False, False, Verdict("", nothing, nothing), refused=reason
    )


def prompt_hash(prompt: EncodedPrompt) -> str:
    """Of what the model reads: token ids and pixels."""
    digest = hashlib.sha256(prompt.token_ids.numpy().tobytes())
    if prompt.vision is not None:
        digest.update(prompt.vision.pixel_values.numpy().tobytes())
    return digest.hexdigest()[:16]


def weights_checksum(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Tells weights apart: a sum over the bits of every tensor, by name."""
    digest = hashlib.sha256()
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, weight in weights:
        bits = weight.detach().contiguous().view(integers[weight.element_size()])
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} {int(bits.sum(dtype=torch.int64))}\n".encode())
    return digest.hexdigest()[:16]
