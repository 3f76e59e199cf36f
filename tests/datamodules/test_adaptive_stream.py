"""Drawing by pass rate in the stream: the same samples for any ranks and workers, and after a resume."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from observe_r1.answers import Gold
from observe_r1.datamodules.neura_ladder import for_other_ranks
from observe_r1.datamodules.prompt_stream import PromptStream
from observe_r1.experience import Completion, EncodedPrompt, GroupScores, Prompt, PromptGroup, Skipped
from observe_r1.ladder.adaptive import AdaptiveCurriculum, AdaptiveOptions

GROUP_SIZE = 4


class Numbered:
    """Samples that are their positions; every eleventh is bad."""

    def __getitem__(self, position: int) -> EncodedPrompt | Skipped:
        if position % 11 == 10:
            return Skipped(position, "image_corrupt", "")
        tokens = torch.tensor([position])
        return EncodedPrompt(Prompt(str(position), "", [], [], Gold("3"), position), tokens, tokens)


def answered(prompt: EncodedPrompt, turn: int) -> PromptGroup:
    """A group with some number of correct answers that depends on the sample and the time."""
    correct = torch.arange(GROUP_SIZE) < (prompt.prompt.position * 7 + turn) % (GROUP_SIZE + 1)
    zeros, judged = torch.zeros(GROUP_SIZE), torch.ones(GROUP_SIZE, dtype=torch.bool)
    completions = [Completion(torch.zeros(1), torch.zeros(1), "")] * GROUP_SIZE
    return PromptGroup(prompt, completions, GroupScores({}, zeros, correct, judged, judged, zeros, 1.0))


def rollouts(
    world: int, turns: range, saved: list[Any], by: Literal["level", "sample"] = "level", workers: int = 0
) -> tuple[list[list[int]], list[Any]]:
    """What `world` ranks are given in some rollouts of six prompts, and their state afterwards."""
    barrier = threading.Barrier(world)
    shared: list[Any] = [None] * world

    def reduce(rank: int, values: Any, how: Callable[[list[Any]], Any]) -> Any:
        shared[rank] = values
        barrier.wait(timeout=300)
        result = how(list(shared))
        barrier.wait(timeout=300)
        return result

    def run(rank: int) -> tuple[list[list[int]], Any]:
        def add(values: Tensor) -> Tensor:
            return reduce(rank, values, lambda all: sum(all[1:], all[0].clone()))  # type: ignore[no-any-return]

        stream = PromptStream(
            Numbered(),  # type: ignore[arg-type]
            60,
            "adaptive",
            seed=2,
            workers=workers,
            rank=rank,
            world_size=world,
            smallest_share=lambda number: reduce(rank, number, min),
            sum_over_ranks=add,
            adaptive=AdaptiveCurriculum(np.arange(60) % 9 / 8, AdaptiveOptions(by)),
        )
        if saved:
            stream.load_state_dict(saved[rank]["stream"])
        drawn = []
        for turn in turns:
            prompts = stream.draw(6)
            drawn.append([prompt.prompt.position for prompt in prompts])
            stream.observe([answered(prompt, turn) for prompt in prompts])
        state = {"stream": stream.state_dict(), "experience": None, "next_micro_batch": 0, "handed_out": 0, "ahead": []}
        return drawn, state

    if world == 1:  # in this thread: workers are forked, and threads do not survive that
        shares, states = zip(run(0), strict=True)
    else:
        assert workers == 0
        with ThreadPoolExecutor(world) as pool:
            shares, states = zip(*pool.map(run, range(world)), strict=True)
    return [sorted(p for share in at_once for p in share) for at_once in zip(*shares, strict=True)], list(states)


@pytest.mark.parametrize("by", ["level", "sample"])
@pytest.mark.parametrize(("world", "workers"), [(1, 1), (1, 2), (2, 0), (3, 0)])
def test_ranks_and_workers_change_nothing(world: int, workers: int, by: Literal["level", "sample"]) -> None:
    drawn, states = rollouts(world, range(8), [], by, workers)
    assert drawn == rollouts(1, range(8), [], by)[0]
    levels = [state["stream"]["adaptive"]["levels"] for state in states]
    assert all(torch.equal(levels[0], other) for other in levels)


@settings(max_examples=20)
@given(st.integers(0, 8), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 3]), st.sampled_from(["level", "sample"]))
def test_resuming_on_any_number_of_ranks(done: int, before: int, after: int, by: Literal["level", "sample"]) -> None:
    whole, _ = rollouts(1, range(8), [], by)
    first, states = rollouts(before, range(done), [], by)
    rest, _ = rollouts(after, range(done, 8), for_other_ranks(states, after), by)
    assert first + rest == whole


def test_a_draw_whose_outcome_is_yet_to_come_is_saved() -> None:
    """As of a rollout that is sampled ahead."""

    def new() -> PromptStream:
        curriculum = AdaptiveCurriculum(np.arange(60) % 9 / 8, AdaptiveOptions("sample"))
        return PromptStream(Numbered(), 60, "adaptive", seed=2, adaptive=curriculum)  # type: ignore[arg-type]

    whole, resumed = new(), new()
    whole.observe([answered(prompt, 0) for prompt in whole.draw(6)])
    ahead = whole.draw(12)
    assert len(ahead) < 12  # some are bad
    resumed.load_state_dict(whole.state_dict())
    for stream in (whole, resumed):
        stream.observe([answered(prompt, 1) for prompt in ahead])
    one, other = ([prompt.prompt.position for prompt in stream.draw(20)] for stream in (whole, resumed))
    assert one == other
    assert torch.equal(whole.state_dict()["adaptive"]["levels"], resumed.state_dict()["adaptive"]["levels"])


def test_a_bad_sample_is_met_once() -> None:
    drawn, states = rollouts(2, range(10), [])
    met = sum(state["stream"]["skipped"].get("image_corrupt", 0) for state in states)
    assert met == len(states[0]["stream"]["adaptive"]["unusable"]) > 0
    assert sum(map(len, drawn)) + met == 60


def test_what_is_mastered_is_drawn_less() -> None:
    """Level ½ is answered right every time from the start; the others stay at ½."""
    levels = np.repeat([0.5, 0.75], 30)
    stream = PromptStream(
        Numbered(),  # type: ignore[arg-type]
        10_000,
        "adaptive",
        adaptive=AdaptiveCurriculum(levels, AdaptiveOptions(half_life=2)),
    )
    counts = []
    for _ in range(30):
        prompts = stream.draw(6)
        counts.append(sum(prompt.prompt.position < 30 for prompt in prompts))
        groups = [answered(prompt, 0) for prompt in prompts]
        for group in groups:
            assert group.scores is not None
            group.scores.correct = torch.arange(GROUP_SIZE) < (4 if group.prompt.prompt.position < 30 else 2)
        stream.observe(groups)
    assert sum(counts[-10:]) < 60 * 0.2 < sum(counts[:2]) * 5


def test_an_order_and_a_curriculum_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="order is 'adaptive'"):
        PromptStream(Numbered(), 3, "adaptive")  # type: ignore[arg-type]
