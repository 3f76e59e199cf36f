"""A reference model in the memory of the CPU: the same log-probs, and no more of it on the device than is said.

Here the device is the CPU as well, and what is fetched is a copy that can be told from what stays.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from observe_r1.encoding import PromptEncoder, PromptOptions
from observe_r1.loading import PolicyOptions, load_policy, load_processor
from observe_r1.objective import ReferenceOffload
from observe_r1.policy import Policy
from observe_r1.strategies import FSDP2, load_models

from .test_collection import MIXED, OPTIONS, Questions, Recited, collect, collector_of


def reference_of(offload: ReferenceOffload) -> Policy:
    _, reference = load_models(SingleDeviceStrategy("cpu"), OPTIONS, "32-true", offload)
    assert reference is not None
    return reference


def bytes_of(parameters: Any) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


@pytest.mark.parametrize("offload", ["model", "blocks"])
def test_logprobs_are_the_same_and_weights_come_and_go(offload: ReferenceOffload) -> None:
    encoder = PromptEncoder(load_processor("quickstart", PromptOptions()), PromptOptions(system_prompt=None))

    def logprobs(reference: Policy) -> list[torch.Tensor]:
        engine = Recited(encoder, dict.fromkeys(range(4), MIXED))
        policy = load_policy(OPTIONS)
        collector = collector_of(policy, engine, reference=reference, needs_reference=True)
        groups = collect(collector, Questions(encoder, 4), count=4, micro_batches=2).groups
        return [values for group in groups for values in group.reference_logprobs]

    reference = reference_of(offload)
    home = {parameter: parameter.data_ptr() for parameter in reference.parameters()}
    blocks = [part for part in reference.modules() if isinstance(part, GradientCheckpointingLayer)]
    fetched: list[int] = []

    def note(block: nn.Module, *_: Any) -> None:
        assert all(parameter.data_ptr() != home[parameter] for parameter in block.parameters())
        fetched.append(bytes_of(p for p in home if p.data_ptr() != home[p]))

    for block in blocks:
        block.register_forward_pre_hook(note)
    for values, expected in zip(logprobs(reference), logprobs(reference_of("none")), strict=True):
        assert torch.equal(values, expected)
    assert all(parameter.data_ptr() == place for parameter, place in home.items())
    assert len(fetched) >= 2 * len(blocks)
    inside = {parameter for block in blocks for parameter in block.parameters()}
    most = bytes_of(home.keys() - inside) + max(bytes_of(block.parameters()) for block in blocks)
    assert max(fetched) == (bytes_of(home) if offload == "model" else most)
    assert most < 0.6 * bytes_of(home)


def test_weights_go_home_after_an_error() -> None:
    reference = reference_of("blocks")
    home = {parameter: parameter.data_ptr() for parameter in reference.parameters()}
    with pytest.raises(TypeError), reference.at_hand():
        next(part for part in reference.modules() if isinstance(part, GradientCheckpointingLayer))()
    assert all(parameter.data_ptr() == place for parameter, place in home.items())


def test_where_it_is_spread_it_is_not_offloaded() -> None:
    with pytest.raises(ValueError, match=r"kl.reference_offload is blocks, and FSDP2 spreads .*: set it to none"):
        load_models(FSDP2(), PolicyOptions("quickstart"), "32-true", "blocks")
