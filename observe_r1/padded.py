"""The plain forward: one row per completion, its prompt repeated. For models that the shared prefix does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from observe_r1.experience import GroupSlice
from observe_r1.logprobs import LogprobHead, TokenLogprobs
from observe_r1.model_inputs import vision_arguments


@dataclass
class PaddedRows:
    """Prompt and completion side by side, one row per completion, padded on the right."""

    inputs: dict[str, Any]  # keyword arguments of the model
    row: Tensor  # [T] row of the hidden state that predicts a token
    column: Tensor  # [T] its column
    targets: Tensor  # [T] token ids


def pad_rows(slices: Sequence[GroupSlice], pad_token_id: int) -> PaddedRows:
    """All completions with their prompts. The last token of a completion predicts nothing and is left out."""
    device = slices[0].prompt.token_ids.device
    rows: list[tuple[GroupSlice, Tensor]] = [
        (part, ids) for part in slices for ids in part.completions if ids.numel()
    ] or [(slices[0], slices[0].completions[0])]
    width = max(part.prompt.token_ids.numel() + max(ids.numel() - 1, 0) for part, ids in rows)
    input_ids = torch.full((len(rows), width), pad_token_id, dtype=torch.long, device=device)
    attention_mask = torch.zeros_like(input_ids)
    mm_token_type_ids = torch.zeros_like(input_ids)
    row_of, column_of = [], []
    for number, (part, ids) in enumerate(rows):
        prompt_length, length = part.prompt.token_ids.numel(), ids.numel()
        end = prompt_length + max(length - 1, 0)
        input_ids[number, :end] = torch.cat([part.prompt.token_ids, ids[:-1]])
        attention_mask[number, :end] = 1
        mm_token_type_ids[number, :prompt_length] = part.prompt.mm_token_type_ids
        row_of.append(torch.full((length,), number, device=device))
        column_of.append(torch.arange(prompt_length - 1, prompt_length - 1 + length, device=device))
    inputs = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "mm_token_type_ids": mm_token_type_ids,
        **vision_arguments(part.prompt.vision for part, _ in rows),
    }
    return PaddedRows(inputs, torch.cat(row_of), torch.cat(column_of), torch.cat([ids for _, ids in rows]))


def padded_logprobs(backbone: Any, head: LogprobHead, slices: Sequence[GroupSlice], pad_token_id: int) -> TokenLogprobs:
    """Log-probs of every completion token by one padded forward of the backbone."""
    rows = pad_rows(slices, pad_token_id)
    hidden = backbone(**rows.inputs, use_cache=False).last_hidden_state[rows.row, rows.column]
    return head(hidden, rows.targets)
