"""Groups that travel between ranks arrive as they were, but for their pictures."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from observe_r1.answers import Gold
from observe_r1.experience import (
    Completion,
    EncodedPrompt,
    GroupScores,
    ImageFeatures,
    Prompt,
    PromptGroup,
    VisionInputs,
)
from observe_r1.parcels import pack, unpack


def group_of(position: int, vision: VisionInputs | None) -> PromptGroup:
    generator = torch.Generator().manual_seed(position)
    messages = [{"role": "user", "content": [{"type": "text", "text": "Wie viele? 多少?"}]}]
    prompt = Prompt(f"q{position}", "made", messages, [Image.new("RGB", (4, 4))], Gold("3"), position, difficulty=0.5)
    tokens = torch.randint(0, 9, (5 + position,), generator=generator)
    completions = [
        Completion(torch.arange(length), torch.rand(length, generator=generator), "a" * length, length == 3)
        for length in (1, 3, 0)
    ]
    yes = torch.tensor([True, False, True])
    parts = {"accuracy": yes.float()}
    scores = GroupScores(parts, torch.rand(3), yes, yes, yes, torch.rand(3, dtype=torch.float64), 1.8)
    return PromptGroup(EncodedPrompt(prompt, tokens, tokens.clone(), vision), completions, scores)


def tensors_of(value: Any) -> list[torch.Tensor]:
    """All tensors in a group, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors_of(item)]
    if isinstance(value, dict):
        return tensors_of(list(value.values()))
    return tensors_of(list(vars(value).values())) if hasattr(value, "__dict__") else []


PIXELS, GRID = torch.rand(8, 6), torch.tensor([[1, 2, 4]])
FEATURES = ImageFeatures([torch.rand(2, 4).bfloat16()], [[torch.rand(2, 4)[:, ::2]]])


@pytest.mark.parametrize("kept", [None, FEATURES], ids=["pixels", "features"])
def test_groups_arrive_as_they_were(kept: ImageFeatures | None) -> None:
    groups = [group_of(0, None), group_of(7, VisionInputs(PIXELS, GRID, kept))]
    arrived = unpack(pack(groups))
    for one, other in zip(groups, arrived, strict=True):
        assert not other.prompt.prompt.images
        assert one.prompt.prompt.messages == other.prompt.prompt.messages
        assert [vars(c)["text"] for c in one.completions] == [c.text for c in other.completions]
        before, after = tensors_of(one), tensors_of(other)
        # what a frozen tower has read is not read again
        gone = [tensor for tensor in before if kept is not None and tensor is PIXELS]
        before = [tensor[:0] if any(tensor is pixels for pixels in gone) else tensor for tensor in before]
        assert len(before) == len(after) > 10
        for a, b in zip(before, after, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
    assert unpack(pack([])) == []


def test_what_arrives_is_saved_without_the_parcel_it_came_in() -> None:
    (arrived,) = unpack(pack([group_of(3, VisionInputs(torch.rand(1000, 100), GRID))]))
    file = io.BytesIO()
    torch.save(arrived.completions[1].token_ids, file)
    assert file.tell() < 4000


EXCHANGE = """
import torch, torch.distributed as dist
from observe_r1 import ranks
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
ranks.PIECE_BYTES = 3 * 7  # several pieces, the last ones empty for some
def parcel(sender, receiver):
    length = [0, 1, 50][(sender + 2 * receiver) % 3]
    generator = torch.Generator().manual_seed(9 * sender + receiver)
    return torch.randint(256, (length,), dtype=torch.uint8, generator=generator)
for _ in range(2):
    arrived = ranks.exchange([parcel(rank, receiver) for receiver in range(world)], torch.device("cpu"))
    assert all(torch.equal(arrived[sender], parcel(sender, rank)) for sender in range(world))
nothing = [torch.empty(0, dtype=torch.uint8)] * world
assert sum(map(len, ranks.exchange(nothing, torch.device("cpu")))) == 0
dist.barrier()
dist.destroy_process_group()
"""


def test_ranks_get_what_is_meant_for_them(tmp_path: Path) -> None:
    script = tmp_path / "exchange.py"
    script.write_text(EXCHANGE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", str(script)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
