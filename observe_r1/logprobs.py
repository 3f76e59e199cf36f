"""Log-probabilities of completion tokens, without keeping anything of size tokens x vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from observe_r1.experience import GroupSlice


@dataclass
class TokenLogprobs:
    """What a forward over completions gives, at their T tokens in order."""

    logprobs: Tensor  # [T] float32
    entropy: Tensor | None = None  # [T] float32, of the full distribution, no gradient


@dataclass
class PaddedRows:
    """Prompt and completion side by side, one row per completion, padded on the right."""

    inputs: dict[str, Tensor]  # keyword arguments of the model
    row: Tensor  # [T] row of the hidden state that predicts a token
    column: Tensor  # [T] its column
    targets: Tensor  # [T] token ids


def pad_rows(slices: Sequence[GroupSlice], pad_token_id: int) -> PaddedRows:
    """All completions with their prompts. The last token of a completion predicts nothing and is left out."""
    device = slices[0].prompt.token_ids.device
    rows: list[tuple[GroupSlice, Tensor]] = [(part, ids) for part in slices for ids in part.completions]
    width = max(part.prompt.token_ids.numel() + ids.numel() - 1 for part, ids in rows)
    input_ids = torch.full((len(rows), width), pad_token_id, dtype=torch.long, device=device)
    attention_mask = torch.zeros_like(input_ids)
    mm_token_type_ids = torch.zeros_like(input_ids)
    row_of, column_of = [], []
    for number, (part, ids) in enumerate(rows):
        prompt_length, length = part.prompt.token_ids.numel(), ids.numel()
        end = prompt_length + length - 1
        input_ids[number, :end] = torch.cat([part.prompt.token_ids, ids[:-1]])
        attention_mask[number, :end] = 1
        mm_token_type_ids[number, :prompt_length] = part.prompt.mm_token_type_ids
        row_of.append(torch.full((length,), number, device=device))
        column_of.append(torch.arange(prompt_length - 1, end, device=device))
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "mm_token_type_ids": mm_token_type_ids}
    vision = [part.prompt.vision for part, _ in rows if part.prompt.vision is not None]
    if vision:
        inputs["pixel_values"] = torch.cat([item.pixel_values for item in vision])
        inputs["image_grid_thw"] = torch.cat([item.image_grid_thw for item in vision])
    return PaddedRows(inputs, torch.cat(row_of), torch.cat(column_of), torch.cat([ids for _, ids in rows]))


def padded_logprobs(
    backbone: nn.Module,
    head: nn.Module,
    slices: Sequence[GroupSlice],
    *,
    pad_token_id: int,
    forbidden: Tensor,
    temperature: float,
    chunk_tokens: int,
    with_entropy: bool = False,
) -> TokenLogprobs:
    """Log-probs of every completion token by one padded forward of the backbone.

    Args:
        backbone: Gives `last_hidden_state` for model inputs.
        head: Maps hidden states to logits.
        forbidden: [F] token ids that cannot be sampled; they are left out of the distribution.
        chunk_tokens: Number of tokens that have logits at once.
    """
    rows = pad_rows(slices, pad_token_id)
    hidden = backbone(**rows.inputs, use_cache=False).last_hidden_state[rows.row, rows.column]
    return head_logprobs(head, hidden, rows.targets, forbidden, temperature, chunk_tokens, with_entropy)


def head_logprobs(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    forbidden: Tensor,
    temperature: float,
    chunk_tokens: int,
    with_entropy: bool = False,
) -> TokenLogprobs:
    """Log-probs [T] of `targets` from hidden states [T, H], chunk by chunk; the backward computes the logits again."""
    logprobs, entropies = [], []
    for start in range(0, len(targets), chunk_tokens):
        part = slice(start, start + chunk_tokens)
        arguments: tuple[Any, ...] = (head, hidden[part], targets[part], forbidden, temperature, with_entropy)
        if torch.is_grad_enabled():
            chosen, entropy = checkpoint(_chunk, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            chosen, entropy = _chunk(*arguments)
        logprobs.append(chosen)
        entropies.append(entropy)
    return TokenLogprobs(torch.cat(logprobs), torch.cat(entropies) if with_entropy else None)


def _chunk(
    head: nn.Module, hidden: Tensor, targets: Tensor, forbidden: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    distribution = sampling_logprobs(head(hidden), forbidden, temperature)
    chosen = distribution.gather(1, targets[:, None])[:, 0]
    if not with_entropy:
        return chosen, None
    detached = distribution.detach()
    # forbidden tokens have log-prob -inf and probability 0: their product must be 0, not nan
    return chosen, -(detached.exp() * detached.clamp(min=torch.finfo(detached.dtype).min)).sum(-1)


def sampling_logprobs(logits: Tensor, forbidden: Tensor, temperature: float) -> Tensor:
    """log softmax of logits [..., V] / temperature without the forbidden tokens: what sampler and trainer share."""
    logits = logits.float() / temperature
    return logits.index_fill(-1, forbidden, float("-inf")).log_softmax(-1)
