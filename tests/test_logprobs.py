"""The log-prob head, against full logits and a plain log-softmax."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from observe_r1.logprobs import LogprobHead, sampling_logprobs

HIDDEN, VOCABULARY = 8, 50
FORBIDDEN = torch.tensor([3, 17])


def plain(hidden: Tensor, module: nn.Module, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies without chunks, over the allowed tokens only."""
    allowed = [token for token in range(VOCABULARY) if token not in FORBIDDEN]
    distribution = (module(hidden)[:, allowed] / temperature).log_softmax(-1)
    column = torch.tensor([allowed.index(int(target)) for target in targets], dtype=torch.long)
    return distribution.gather(1, column[:, None])[:, 0], -(distribution.exp() * distribution).sum(-1)


class LowRank(nn.Linear):
    """A head with an adapter: not the product with its weight alone."""

    def __init__(self) -> None:
        super().__init__(HIDDEN, VOCABULARY, bias=False)
        self.down, self.up = nn.Linear(HIDDEN, 2, bias=False), nn.Linear(2, VOCABULARY, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) + self.up(self.down(hidden))


HEADS = {
    "linear": lambda: nn.Linear(HIDDEN, VOCABULARY, bias=False),
    "bias": lambda: nn.Linear(HIDDEN, VOCABULARY),
    "adapter": LowRank,
}


@pytest.mark.parametrize("kind", HEADS)
@settings(max_examples=30)
@given(
    tokens=st.integers(0, 20),
    chunk=st.integers(1, 25),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    seed=st.integers(0, 999),
)
def test_values_and_gradients(kind: str, tokens: int, chunk: int, temperature: float, seed: int) -> None:
    torch.manual_seed(seed)
    module = HEADS[kind]().double()
    hidden = torch.randn(tokens, HIDDEN, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(18, VOCABULARY, (tokens,))
    upstream = torch.randn(tokens, dtype=torch.float64)
    wanted, wanted_entropy = plain(hidden, module, targets, temperature)
    inputs = [hidden, *module.parameters()]
    expected = torch.autograd.grad((wanted * upstream).sum(), inputs)
    output = LogprobHead(module, FORBIDDEN, temperature, chunk, True)(hidden, targets)
    found = torch.autograd.grad((output.logprobs * upstream).sum(), inputs)
    assert output.entropy is not None
    assert not output.entropy.requires_grad
    torch.testing.assert_close(output.logprobs, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(output.entropy, wanted_entropy.detach(), rtol=0, atol=1e-12)
    for got, right in zip(found, expected, strict=True):
        torch.testing.assert_close(got, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", HEADS)
def test_nothing_of_size_tokens_by_vocabulary_is_kept(kind: str) -> None:
    """What autograd saves between forward and backward stays below one chunk of logits."""
    module, tokens, chunk = HEADS[kind](), 400, 10
    hidden = torch.randn(tokens, HIDDEN, requires_grad=True)
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        LogprobHead(module, FORBIDDEN, 1.0, chunk)(hidden, torch.randint(18, VOCABULARY, (tokens,)))
    assert sum(saved.values()) < tokens * VOCABULARY / 2
    assert max(saved.values()) <= tokens * HIDDEN


def test_a_frozen_head_gets_no_gradient() -> None:
    module = nn.Linear(HIDDEN, VOCABULARY, bias=False).requires_grad_(False)
    hidden = torch.randn(5, HIDDEN, requires_grad=True)
    LogprobHead(module, FORBIDDEN, 1.0, 2)(hidden, torch.arange(20, 25)).logprobs.sum().backward()
    assert module.weight.grad is None
    assert hidden.grad is not None


@pytest.mark.parametrize("kind", ["linear", "bias"])
def test_half_precision_sums_in_float32(kind: str) -> None:
    """bf16 states and weights: the log-probs are float32, as exact as the logits are."""
    torch.manual_seed(0)
    module = HEADS[kind]().bfloat16()
    hidden = torch.randn(9, HIDDEN).bfloat16().requires_grad_()
    targets = torch.arange(20, 29)
    output = LogprobHead(module, FORBIDDEN, 1.0, 4)(hidden, targets)
    wanted = sampling_logprobs(module(hidden), FORBIDDEN, 1.0).gather(1, targets[:, None])[:, 0]
    assert output.logprobs.dtype == torch.float32
    torch.testing.assert_close(output.logprobs, wanted, rtol=0, atol=1e-5)
    output.logprobs.sum().backward()
    assert module.weight.grad is not None
    assert module.weight.grad.dtype == torch.bfloat16


def test_under_autocast_forward_and_backward_use_the_same_logits() -> None:
    """Lightning's bf16-mixed runs the forward inside of autocast and the backward outside."""
    torch.manual_seed(1)
    module = HEADS["linear"]()
    targets = torch.arange(20, 29)

    def gradient(head: Any) -> tuple[Tensor, Tensor]:
        hidden = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(2)).requires_grad_()
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logprobs = head(hidden)
        logprobs.sum().backward()
        assert hidden.grad is not None
        assert module.weight.grad is not None
        return hidden.grad, module.weight.grad.clone()

    ours = gradient(lambda hidden: LogprobHead(module, FORBIDDEN, 1.0, 4)(hidden, targets).logprobs)
    stock = gradient(lambda hidden: sampling_logprobs(module(hidden), FORBIDDEN, 1.0).gather(1, targets[:, None])[:, 0])
    for got, wanted in zip(ours, stock, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0.03, atol=0.01)
