"""The order of training: the ladder's, dealt by global index, for any ranks, workers and points of resuming."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from observe_r1.answers import Gold
from observe_r1.datamodules.neura_ladder import for_other_ranks
from observe_r1.datamodules.prompt_stream import EncodedDataset, PromptStream, curriculum_order
from observe_r1.encoding import PromptEncoder, PromptOptions
from observe_r1.experience import EncodedPrompt, Prompt, Skipped
from observe_r1.ladder.reader import LadderDataset
from observe_r1.loading import load_processor

SIZES = st.integers(1, 60)
FIXED_ORDERS: st.SearchStrategy[Any] = st.sampled_from(["ladder", "random"])


class Numbered:
    """Stands where an encoded dataset does and gives back positions; some samples are bad."""

    def __init__(self, bad: frozenset[int] = frozenset()) -> None:
        self.bad = bad
        self.read: list[int] = []

    def __getitem__(self, position: int) -> EncodedPrompt | Skipped:
        self.read.append(position)
        if position in self.bad:
            return Skipped(position, "image_corrupt", f"sample {position}")
        tokens = torch.tensor([position])
        return EncodedPrompt(Prompt(str(position), "", [], [], Gold("3"), position), tokens, tokens)


def positions(stream: PromptStream, count: int) -> list[int]:
    return [prompt.prompt.position for prompt in stream.draw(count)]


def stream_of(size: int, bad: frozenset[int] = frozenset(), **options: Any) -> PromptStream:
    return PromptStream(Numbered(bad), size, **options)  # type: ignore[arg-type]


@given(
    size=st.integers(1, 60),
    world=st.integers(1, 5),
    count=st.integers(1, 20),
    order=FIXED_ORDERS,
)
def test_the_union_over_ranks_is_the_order(size: int, world: int, count: int, order: Any) -> None:
    dealt: dict[int, int] = {}
    for rank in range(world):
        stream = stream_of(size, rank=rank, world_size=world, order=order, seed=3)
        number = 0
        while not stream.exhausted:
            for position in positions(stream, count):
                dealt[rank + world * number] = position
                number += 1
    assert [dealt[n] for n in range(size)] == list(curriculum_order(size, order, 3, 0))
    assert sorted(dealt.values()) == list(range(size))


@given(
    size=st.integers(1, 60),
    start=st.integers(0, 60),
    count=st.integers(1, 9),
    order=FIXED_ORDERS,
)
def test_resuming_anywhere_continues_and_reads_nothing_before(size: int, start: int, count: int, order: Any) -> None:
    whole = stream_of(size, order=order, seed=1)
    before = positions(whole, min(start, size))
    resumed = stream_of(size, order=order, seed=1)
    resumed.load_state_dict(whole.state_dict())
    rest = [positions(resumed, count) for _ in range(-(-size // count))]
    assert [p for part in rest for p in part] == list(curriculum_order(size, order, 1, 0))[len(before) :]
    assert not set(resumed.dataset.read) & set(before)  # type: ignore[attr-defined]


@settings(max_examples=12)
@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 2), st.integers(1, 20), FIXED_ORDERS)
def test_the_union_is_the_order_with_loader_workers(
    size: int, world: int, workers: int, count: int, order: Any
) -> None:
    dealt = {}
    for rank in range(world):
        stream = stream_of(size, rank=rank, world_size=world, workers=workers, order=order, seed=3)
        mine = []
        while not stream.exhausted:
            mine += positions(stream, count)
        dealt.update({rank + world * number: position for number, position in enumerate(mine)})
    assert [dealt[n] for n in range(size)] == list(curriculum_order(size, order, 3, 0))


@given(
    st.integers(8, 60),
    st.lists(st.integers(1, 5), min_size=2, max_size=4),
    st.lists(st.integers(0, 3), min_size=3, max_size=3),
    st.frozensets(st.integers(0, 59), max_size=5),
    FIXED_ORDERS,
)
def test_resuming_on_other_numbers_of_ranks_goes_on_with_the_order(
    size: int, worlds: list[int], blocks: list[int], bad: frozenset[int], order: Any
) -> None:
    """Some blocks on each number of ranks in turn, and the rest on the last one."""
    saved: list[Any] = []
    seen: list[int] = []
    read: list[int] = []
    whole = list(curriculum_order(size, order, 5, 0))
    for turn, world in enumerate(worlds):
        left_over = size % (4 * world) if size % (4 * world) < world else 0
        together = {"world_size": world, "left_over": left_over, "smallest_share": lambda number: 1}
        streams = [
            stream_of(size - left_over, bad, rank=rank, order=order, seed=5, **together) for rank in range(world)
        ]
        if saved:
            for stream, state in zip(streams, for_other_ranks(saved, world), strict=True):
                assert state is not None
                stream.load_state_dict(state["stream"])
        last = turn == len(worlds) - 1
        for _ in range(size if last else blocks[turn]):
            start = streams[0].position
            shares = [positions(stream, world) for stream in streams]  # one sample each, unless it is bad
            block = [position for share in shares for position in share]
            assert sorted(block) == sorted(set(whole[start : min(start + world, size - left_over)]) - bad)
            seen += block
        read += [position for stream in streams for position in stream.dataset.read]  # type: ignore[attr-defined]
        saved = [
            {"stream": s.state_dict(), "experience": None, "next_micro_batch": 0, "handed_out": 0} for s in streams
        ]
    assert sorted(read) == sorted(whole[: streams[0].position])  # each exactly once
    assert set(seen) == set(read) - bad
    assert streams[0].position >= size - world
    assert sum(saved[rank]["stream"]["skipped"].get("image_corrupt", 0) for rank in range(world)) == len(
        bad & set(read)
    )


def test_samples_too_few_for_all_ranks_are_counted() -> None:
    streams = [stream_of(9, rank=rank, world_size=3, left_over=2) for rank in range(3)]
    for stream in streams:
        positions(stream, 9)
        stream.next_epoch()
    assert [dict(stream.skipped) for stream in streams] == [{"fewer_than_ranks": 2}, {}, {}]


def test_random_order_differs_between_epochs_and_seeds() -> None:
    orders = [tuple(curriculum_order(50, "random", seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_bad_samples_are_counted_with_an_example() -> None:
    stream = stream_of(6, bad=frozenset({1, 4}))
    assert positions(stream, 6) == [0, 2, 3, 5]
    assert stream.skipped == {"image_corrupt": 2}
    assert stream.examples == {"image_corrupt": "sample 1"}


def test_a_block_of_bad_samples_is_drawn_over() -> None:
    stream = stream_of(10, bad=frozenset(range(4)))
    assert positions(stream, 2) == [4]
    assert stream.position == 5


@given(SIZES, st.frozensets(st.integers(0, 59)), st.integers(2, 3), st.integers(1, 4))
def test_ranks_end_together(size: int, bad: frozenset[int], world: int, per_rank: int) -> None:
    """A rank that trained on while another has ended would wait for it forever."""
    barrier = threading.Barrier(world)
    numbers = [0] * world

    def run(rank: int) -> list[int]:
        def smallest(number: int) -> int:
            numbers[rank] = number
            barrier.wait(timeout=300)
            result = min(numbers)
            barrier.wait(timeout=300)
            return result

        stream = stream_of(size - size % world, bad, rank=rank, world_size=world, smallest_share=smallest)
        draws = []
        while not stream.exhausted:
            draws.append(len(stream.draw(per_rank * world)))
        return draws

    with ThreadPoolExecutor(world) as pool:
        draws = list(pool.map(run, range(world)))
    assert len({len(of_rank) for of_rank in draws}) == 1
    for at_once in zip(*draws, strict=True):
        assert all(at_once) or not any(at_once)


def test_nothing_usable_ends_the_epoch() -> None:
    stream = stream_of(4, bad=frozenset(range(4)))
    assert positions(stream, 2) == []
    assert stream.exhausted


@pytest.fixture(scope="module")
def encoded(tiny_ladder: Path) -> EncodedDataset:
    encoder = PromptEncoder(load_processor("quickstart", PromptOptions()), PromptOptions(system_prompt=None))
    return EncodedDataset(LadderDataset(tiny_ladder), encoder)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_loader_workers_do_not_change_the_order(encoded: EncodedDataset, workers: int) -> None:
    stream = PromptStream(encoded, 24, workers=workers)
    drawn = [prompt.prompt.position for _ in range(3) for prompt in stream.draw(8)]
    assert drawn == list(range(24))


def test_encoding_refuses_what_would_break_the_forward(encoded: EncodedDataset) -> None:
    prompt = encoded.prompts[0]
    assert isinstance(prompt, Prompt)
    smuggled = Prompt("x", "", [{"role": "user", "content": "<|image_pad|> and no image"}], [], Gold("3"))
    refused = encoded.encoder.encode(smuggled)
    assert isinstance(refused, Skipped)
    assert refused.reason == "image_count_mismatch"
    text = [{"type": "image", "index": 0}, {"type": "text", "text": "What does <|video_pad|> mean?"}]
    smuggled = Prompt("x", "", [{"role": "user", "content": text}], prompt.images[:1], Gold("3"))
    refused = encoded.encoder.encode(smuggled)
    assert isinstance(refused, Skipped)
    assert refused.reason == "video_placeholder"
    short = PromptEncoder(encoded.encoder.processor, PromptOptions(None, max_prompt_tokens=10))
    refused = short.encode(prompt)
    assert isinstance(refused, Skipped)
    assert (refused.reason, "10" in refused.detail) == ("prompt_too_long", True)


def test_pixel_limits_reach_the_image_processor(encoded: EncodedDataset) -> None:
    prompt = encoded.prompts[0]
    assert isinstance(prompt, Prompt)
    areas = []
    for limits in ({}, {"max_pixels": 56 * 56}, {"min_pixels": 168 * 168, "max_pixels": 224 * 224}):
        options = PromptOptions(None, **limits)
        one = PromptEncoder(load_processor("quickstart", options), options).encode(prompt)
        assert not isinstance(one, Skipped)
        assert one.vision is not None
        areas.append(int(one.vision.image_grid_thw.prod()) * 14 * 14)
    assert areas == [112 * 112, 56 * 56, 168 * 168]


@settings(max_examples=10)
@given(st.integers(0, 23))
def test_encoded_prompts_hold_one_copy_of_the_pixels(encoded: EncodedDataset, position: int) -> None:
    prompt = encoded[position]
    assert not isinstance(prompt, Skipped)
    assert prompt.vision is not None
    patches = int(prompt.vision.image_grid_thw.prod(1).sum())
    assert prompt.vision.pixel_values.shape[0] == patches
    assert int((prompt.mm_token_type_ids == 1).sum()) == patches // 4
