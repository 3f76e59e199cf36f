"""Where prompts and completions lie in a packed row. Index code only: no model, no attention.

A row holds groups back to back, without padding:   [p1 c11 … c1G | p2 c21 … c2G | …]
A completion attends to its own prompt and, causally, to itself. Its rotary positions continue its prompt's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from observe_r1.experience import GroupSlice


@dataclass(frozen=True)
class GroupSpan:
    """One group in a row."""

    prompt: slice
    completions: tuple[slice, ...]  # directly after the prompt, one after the other; those that feed nothing left out

    @property
    def block(self) -> slice:
        """All completions together."""
        return slice(self.prompt.stop, self.completions[-1].stop if self.completions else self.prompt.stop)


@dataclass(frozen=True)
class RowLayout:
    """The groups of a row, and what one variable-length attention call needs to know about them."""

    length: int  # L
    groups: tuple[GroupSpan, ...]

    @property
    def varlen(self) -> VarlenIndex:
        """Every prompt and completion as a sequence of queries; a completion's keys are its prompt's and its own.

        With the causal mask aligned to the end of the keys, one call covers the row.
        """
        keys, query_lengths, key_lengths = [], [], []
        for group in self.groups:
            prompt = torch.arange(group.prompt.start, group.prompt.stop)
            keys.append(prompt)
            query_lengths.append(len(prompt))
            key_lengths.append(len(prompt))
            for completion in group.completions:
                own = torch.arange(completion.start, completion.stop)
                keys += [prompt, own]
                query_lengths.append(len(own))
                key_lengths.append(len(prompt) + len(own))
        return VarlenIndex(
            torch.cat(keys), _starts(query_lengths), _starts(key_lengths), max(query_lengths), max(key_lengths)
        )


@dataclass(frozen=True)
class VarlenIndex:
    """Arguments of a variable-length attention call over S sequences."""

    keys: Tensor  # [K] long, row position of each key
    query_starts: Tensor  # [S + 1] int32
    key_starts: Tensor  # [S + 1] int32
    longest_query: int
    longest_key: int

    def to(self, device: torch.device) -> VarlenIndex:
        return VarlenIndex(
            self.keys.to(device),
            self.query_starts.to(device),
            self.key_starts.to(device),
            self.longest_query,
            self.longest_key,
        )


@dataclass(frozen=True)
class PackedRow:
    """Whole or partial groups as the model reads them, and where the predictions of completion tokens are."""

    token_ids: Tensor  # [L] long
    mm_token_type_ids: Tensor  # [L] long
    positions: Tensor  # [3, L] rotary positions, [1, L] for models without multimodal ones
    layout: RowLayout
    source: Tensor  # [T] row position whose hidden state predicts a completion token
    targets: Tensor  # [T] long, the completion tokens in the order of the slices


def pack(slices: Sequence[GroupSlice], prompt_positions: Sequence[Tensor]) -> PackedRow:
    """Packs groups into one row.

    The last token of a completion predicts nothing and is not fed; its first is predicted by the end of the prompt.

    Args:
        prompt_positions: [3, P] or [1, P] of each prompt.
    """
    device = slices[0].prompt.token_ids.device
    token_ids: list[Tensor] = []
    positions: list[Tensor] = []
    types: list[Tensor] = []
    source: list[Tensor] = []
    groups: list[GroupSpan] = []
    end = 0
    for part, of_prompt in zip(slices, prompt_positions, strict=True):
        prompt = part.prompt
        span = slice(end, end + prompt.token_ids.numel())
        end = span.stop
        token_ids.append(prompt.token_ids)
        types.append(prompt.mm_token_type_ids)
        positions.append(of_prompt)
        following = of_prompt.max() + 1
        fed: list[slice] = []
        for completion in part.completions:
            length = max(completion.numel() - 1, 0)
            if completion.numel():
                source.append(torch.tensor([span.stop - 1]))
            if not length:
                continue
            source.append(torch.arange(end, end + length))
            token_ids.append(completion[:-1])
            types.append(torch.zeros_like(completion[:-1]))
            positions.append((following + torch.arange(length, device=device)).expand(len(of_prompt), length))
            fed.append(slice(end, end + length))
            end += length
        groups.append(GroupSpan(span, tuple(fed)))
    return PackedRow(
        torch.cat(token_ids),
        torch.cat(types),
        torch.cat(positions, dim=1),
        RowLayout(end, tuple(groups)),
        torch.cat([*source, torch.zeros(0, dtype=torch.long)]).to(device),
        torch.cat([completion for part in slices for completion in part.completions]),
    )


def may_attend(layout: RowLayout) -> Tensor:
    """[L, L] bool, the rule of a row written down plainly: what query i (row) may see of key j (column)."""
    mask = torch.zeros(layout.length, layout.length, dtype=torch.bool)
    for group in layout.groups:
        for part in (group.prompt, *group.completions):
            size = part.stop - part.start
            mask[part, part] = torch.ones(size, size, dtype=torch.bool).tril()
        for completion in group.completions:
            mask[completion, group.prompt] = True
    return mask


def segments(layout: RowLayout) -> Iterator[tuple[slice, slice | None]]:
    """(queries, prompt they attend to beside themselves) of every prompt and completion, in row order."""
    for group in layout.groups:
        yield group.prompt, None
        for completion in group.completions:
            yield completion, group.prompt


def _starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
