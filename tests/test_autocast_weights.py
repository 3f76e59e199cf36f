"""A reference model under autocast: half the memory, the log-probs bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from PIL import Image
from torch import nn

from observe_r1.answers import Gold
from observe_r1.autocast_weights import keep_cast
from observe_r1.encoding import PromptEncoder, PromptOptions
from observe_r1.experience import EncodedPrompt, GroupSlice, Prompt
from observe_r1.loading import PolicyOptions, load_processor, load_reference
from observe_r1.objective import ReferenceOffload
from observe_r1.policy import Policy
from observe_r1.strategies import load_models

MESSAGES = [{"role": "user", "content": [{"type": "image", "index": 0}, {"type": "text", "text": "How many?"}]}]


@pytest.fixture(scope="module")
def slices() -> list[GroupSlice]:
    """Two groups of ragged random completions, one of them with pictures of noise."""
    encoder = PromptEncoder(load_processor("quickstart", PromptOptions()), PromptOptions(system_prompt=None))
    numbers = torch.Generator().manual_seed(0)
    groups = []
    for side in (112, 84):
        noise = torch.randint(0, 256, (side, side, 3), generator=numbers, dtype=torch.uint8).numpy()
        prompt = encoder.encode(Prompt("", "", MESSAGES, [Image.fromarray(noise)], Gold("3")))
        assert isinstance(prompt, EncodedPrompt)
        completions = [torch.randint(20, 260, (length,), generator=numbers) for length in (5, 19, 1)]
        groups.append(GroupSlice(prompt, completions))
    return groups


def logprobs(policy: Policy, slices: Sequence[GroupSlice]) -> torch.Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), policy.at_hand():
        return policy(slices, 0.9).logprobs


@pytest.mark.parametrize("forward", ["shared_prefix", "padded"])
@pytest.mark.parametrize("offload", ["none", "model", "blocks"])
def test_logprobs_are_those_of_float32_weights(forward: Any, offload: ReferenceOffload, slices: Any) -> None:
    options = PolicyOptions("quickstart", forward=forward, logprob_chunk_tokens=8)
    _, reference = load_models(SingleDeviceStrategy("cpu"), options, "bf16-mixed", offload)
    assert reference is not None
    assert torch.equal(logprobs(reference, slices), logprobs(load_reference(options), slices))
    kept = {name: parameter.dtype for name, parameter in reference.named_parameters()}
    half = {name for name, dtype in kept.items() if dtype == torch.bfloat16}
    assert {name for name in kept if name.endswith("proj.weight")} <= half  # of blocks, and of patches
    assert not {name for name in kept if "norm" in name or "embed_tokens" in name} & half


def test_an_output_layer_that_is_the_embedding_stays_as_it_is() -> None:
    """As in Qwen2.5-VL-3B: rounded, it would give out other embeddings. Where it is not, as in 7B, it is rounded."""
    tied, untied = (nn.ModuleList([nn.Embedding(5, 3), nn.Linear(3, 5)]) for _ in range(2))
    tied[1].weight = tied[0].weight
    for model in (tied, untied):
        keep_cast(model, torch.bfloat16)
    assert tied[1].weight is tied[0].weight
    assert (tied[1].weight.dtype, tied[1].bias.dtype) == (torch.float32, torch.bfloat16)
    assert (untied[0].weight.dtype, untied[1].weight.dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-true", torch.bfloat16)])
def test_without_autocast_all_weights_have_one_dtype(precision: str, dtype: torch.dtype) -> None:
    _, reference = load_models(SingleDeviceStrategy("cpu"), PolicyOptions("quickstart"), precision, "none")
    assert reference is not None
    assert {parameter.dtype for parameter in reference.parameters()} == {dtype}
