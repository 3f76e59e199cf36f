"""The plain forward that everything here is compared with, and a stand-in for the CUDA kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from observe_r1.experience import GroupSlice


@contextmanager
def lifted_casts() -> Iterator[None]:
    """Takes back the casts to float32 in the models' own code, so that float64 stays float64 throughout."""
    to = Tensor.to

    def lifted_to(tensor: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if tensor.dtype == torch.float64:
            arguments = tuple(torch.float64 if value is torch.float32 else value for value in arguments)
            options = {name: torch.float64 if value is torch.float32 else value for name, value in options.items()}
        return to(tensor, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "to", lifted_to)
        patch.setattr(Tensor, "float", lambda tensor: lifted_to(tensor, torch.float32))
        yield


def naive_logprobs(
    model: Any, slices: Sequence[GroupSlice], temperature: float, forbidden: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies, [T] each: every completion alone with its prompt and images, full logits."""
    logprobs, entropies = [], []
    for part in slices:
        for completion in part.completions:
            if not len(completion):
                continue
            ids = torch.cat([part.prompt.token_ids, completion])[None]
            images = {}
            if part.prompt.vision is not None:
                pixels = part.prompt.vision.pixel_values.to(model.dtype)
                images = {"pixel_values": pixels, "image_grid_thw": part.prompt.vision.image_grid_thw}
            logits = model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=F.pad(part.prompt.mm_token_type_ids, (0, len(completion)))[None],
                use_cache=False,
                **images,
            ).logits[0, -len(completion) - 1 : -1]
            kept = [token for token in range(logits.shape[1]) if token not in forbidden]
            distribution = (logits / temperature)[:, kept].log_softmax(-1)
            column = torch.tensor([kept.index(int(token)) for token in completion])
            logprobs.append(distribution.gather(1, column[:, None])[:, 0])
            entropies.append(-(distribution.exp() * distribution).sum(-1).detach())
    return torch.cat(logprobs), torch.cat(entropies)


def varlen_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    longest_query: int,
    longest_key: int,
    *,
    window_size: tuple[int, int],
    scale: float,
    enable_gqa: bool,
) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn` as documented, which runs on CUDA only: sequence by sequence."""
    assert window_size == (-1, 0)
    outputs = []
    for number in range(len(query_starts) - 1):
        queries = slice(int(query_starts[number]), int(query_starts[number + 1]))
        keys = slice(int(key_starts[number]), int(key_starts[number + 1]))
        rows, columns = queries.stop - queries.start, keys.stop - keys.start
        assert 0 < rows <= longest_query
        assert columns <= longest_key
        outputs.append(
            F.scaled_dot_product_attention(
                query[queries].transpose(0, 1),
                key[keys].transpose(0, 1),
                value[keys].transpose(0, 1),
                attn_mask=torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows),
                scale=scale,
                enable_gqa=enable_gqa,
            ).transpose(0, 1)
        )
    return torch.cat(outputs)


@pytest.fixture(scope="session", autouse=True)
def varlen_on_the_cpu() -> Iterator[None]:
    """Lets the backend `varlen` run here: its index code is what is tested, not the kernel."""
    import torch.nn.attention.varlen as kernels

    patch = pytest.MonkeyPatch()
    patch.setattr(kernels, "varlen_attn", varlen_reference)
    yield
    patch.undo()
