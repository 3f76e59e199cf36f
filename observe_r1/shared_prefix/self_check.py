"""Does the packed forward of a model give what its plain forward gives? Asked once, on real data, before training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from observe_r1.experience import GroupSlice
from observe_r1.logprobs import TokenLogprobs

GROUPS, COMPLETIONS, TOKENS = 2, 2, 16
FULL_PRECISION_LIMIT = 1e-3  # largest difference; a wrong mask or position costs 0.09 and more
HALF_PRECISION_LIMIT = 0.05  # mean difference; two correct kernels differ by a few hundredths at single tokens

Forward = Callable[[Sequence[GroupSlice]], TokenLogprobs]


def disagreement(packed: Forward, plain: Forward, slices: Sequence[GroupSlice], dtype: torch.dtype) -> str | None:
    """Why the packed forward cannot be used, None when it can.

    Compares two groups of two completions, cut to a few tokens, so that the check costs no memory of its own.
    """
    sample = [
        GroupSlice(part.prompt, [ids[:TOKENS] for ids in sorted(part.completions, key=len, reverse=True)[:COMPLETIONS]])
        for part in sorted(slices, key=lambda part: -max(map(len, part.completions)))[:GROUPS]
    ]
    with torch.no_grad():
        try:
            difference = (packed(sample).logprobs - plain(sample).logprobs).abs()
        except torch.OutOfMemoryError:
            raise
        except (ValueError, TypeError, RuntimeError, AttributeError, KeyError, IndexError) as error:
            return f"it raised {type(error).__name__}: {error}"
    half = dtype in (torch.float16, torch.bfloat16)
    found = float(difference.mean() if half else difference.max())
    limit = HALF_PRECISION_LIMIT if half else FULL_PRECISION_LIMIT
    if not found <= limit:  # nan too
        kind = "on average" if half else "at most"
        return f"its log-probs differ by {found:.2g} {kind}, where {limit:g} is allowed"
    return None
