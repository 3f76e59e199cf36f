"""The forward over packed rows: hidden states of a whole row, log-probs at its completion tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from observe_r1.experience import GroupSlice
from observe_r1.logprobs import LogprobHead, TokenLogprobs
from observe_r1.model_inputs import prompt_positions, vision_arguments
from observe_r1.shared_prefix.attention import PrefixAttention
from observe_r1.shared_prefix.layout import pack


def shared_prefix_logprobs(
    backbone: Any, head: LogprobHead, slices: Sequence[GroupSlice], backend: str
) -> TokenLogprobs:
    """Log-probs of every completion token, with each prompt and its images computed once.

    Equal to the forward that repeats the prompt for every completion, gradients too, up to rounding.

    Args:
        backbone: The model without its head, its text attention set to `shared_prefix.NAME`.
        backend: Name of an attention backend.
    """
    row = pack(slices, [prompt_positions(backbone, part.prompt) for part in slices])
    arguments: dict[str, Any] = {"position_ids": row.positions[:, None]}
    if hasattr(backbone, "get_rope_index"):
        arguments["mm_token_type_ids"] = row.mm_token_type_ids[None]
    else:
        # positions that start again make transformers build an L x L mask, unless it is given one of four dimensions
        arguments["position_ids"] = row.positions
        arguments["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=row.token_ids.device)
    hidden = backbone(
        input_ids=row.token_ids[None],
        use_cache=False,
        shared_prefix=PrefixAttention(row.layout, backend),
        **arguments,
        **vision_arguments(part.prompt.vision for part in slices),
    ).last_hidden_state[0]
    return head(hidden[row.source], row.targets)
