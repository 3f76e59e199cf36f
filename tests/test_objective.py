"""Every objective against its formula written out in float64 loops, and its exact sum over any split."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from observe_r1.experience import StepTotals
from observe_r1.objective import (
    OBJECTIVES,
    ImportanceOptions,
    KLOptions,
    ObjectiveOptions,
    TokenBatch,
    importance_weights,
    kl_estimate,
    kl_to_come,
)

NAMES = sorted(OBJECTIVES)
SEEDS = st.integers(0, 2**32 - 1)


@dataclass
class Sequences:
    """A step of ragged sequences, as lists: what the references below loop over."""

    new: list[Tensor]
    old: list[Tensor]
    advantage: list[float]

    @staticmethod
    def draw(seed: int) -> Sequences:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(
            1, 9, (int(torch.randint(2, 7, (), generator=generator)),), generator=generator
        ).tolist()
        old = [-torch.rand(n, generator=generator, dtype=torch.float64) * 4 for n in lengths]
        new = [(o + 0.5 * torch.randn(len(o), generator=generator, dtype=torch.float64)).requires_grad_() for o in old]
        return Sequences(new, old, torch.randn(len(lengths), generator=generator, dtype=torch.float64).tolist())

    def batch(self, chosen: list[int]) -> TokenBatch:
        lengths = torch.tensor([len(self.new[i]) for i in chosen])
        sequence = torch.repeat_interleave(torch.arange(len(chosen)), lengths)
        return TokenBatch(
            logprobs=torch.cat([self.new[i] for i in chosen]),
            old_logprobs=torch.cat([self.old[i] for i in chosen]),
            advantages=torch.tensor([self.advantage[i] for i in chosen], dtype=torch.float64)[sequence],
            sequence=sequence,
            lengths=lengths,
            weight=torch.ones(int(lengths.sum()), dtype=torch.float64),
        )

    @property
    def totals(self) -> StepTotals:
        tokens = sum(len(n) for n in self.new)
        return StepTotals(len(self.new), tokens, tokens)


def options_of(name: str) -> ObjectiveOptions:
    return ObjectiveOptions(name, 0.2, 0.28, 3.0, constant_length=7)  # type: ignore[arg-type]


def clip(ratio: float, advantage: float) -> float:
    value = min(ratio * advantage, max(0.8, min(1.28, ratio)) * advantage)
    return max(value, 3.0 * advantage) if advantage < 0 else value


def reference_grpo(s: Sequences) -> float:
    means = [
        sum(clip(math.exp(n - o), a) for n, o in zip(new.tolist(), old.tolist(), strict=True)) / len(new)
        for new, old, a in zip(s.new, s.old, s.advantage, strict=True)
    ]
    return -sum(means) / len(means)


def reference_dapo(s: Sequences) -> float:
    terms = [
        clip(math.exp(n - o), a)
        for new, old, a in zip(s.new, s.old, s.advantage, strict=True)
        for n, o in zip(new.tolist(), old.tolist(), strict=True)
    ]
    return -sum(terms) / len(terms)


def reference_dr_grpo(s: Sequences) -> float:
    return reference_dapo(s) * s.totals.tokens / (7 * len(s.new))


def reference_gspo(s: Sequences) -> float:
    values = [
        clip(math.exp((sum(new.tolist()) - sum(old.tolist())) / len(new)), a)
        for new, old, a in zip(s.new, s.old, s.advantage, strict=True)
    ]
    return -sum(values) / len(values)


def reference_cispo(s: Sequences) -> float:
    terms = [
        min(math.exp(n - o), 1.28) * a * n
        for new, old, a in zip(s.new, s.old, s.advantage, strict=True)
        for n, o in zip(new.tolist(), old.tolist(), strict=True)
    ]
    return -sum(terms) / len(terms)


REFERENCES: dict[str, Callable[[Sequences], float]] = {
    "grpo": reference_grpo,
    "dapo": reference_dapo,
    "dr_grpo": reference_dr_grpo,
    "gspo": reference_gspo,
    "cispo": reference_cispo,
}


@pytest.mark.parametrize("name", NAMES)
@given(seed=SEEDS)
def test_loss_is_the_formula(name: str, seed: int) -> None:
    s = Sequences.draw(seed)
    loss = OBJECTIVES[name](s.batch(list(range(len(s.new)))), options_of(name), s.totals).loss
    assert loss.item() == pytest.approx(REFERENCES[name](s), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=50)
@given(seed=SEEDS, data=st.data())
def test_any_split_adds_up_to_the_whole_step(name: str, seed: int, data: st.DataObject) -> None:
    s = Sequences.draw(seed)
    everything = list(range(len(s.new)))
    whole = torch.autograd.grad(OBJECTIVES[name](s.batch(everything), options_of(name), s.totals).loss, s.new)
    part_of = data.draw(st.lists(st.integers(0, 2), min_size=len(everything), max_size=len(everything)))
    added = [torch.zeros_like(gradient) for gradient in whole]
    for part in set(part_of):
        chosen = [i for i in everything if part_of[i] == part]
        loss = OBJECTIVES[name](s.batch(chosen), options_of(name), s.totals).loss
        for i, gradient in zip(chosen, torch.autograd.grad(loss, [s.new[i] for i in chosen]), strict=True):
            added[i] += gradient
    for one, other in zip(added, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


@given(SEEDS)
def test_gspo_gradient_is_that_of_the_sequence_ratio(seed: int) -> None:
    s = Sequences.draw(seed)
    options = ObjectiveOptions("gspo", 0.2, 0.28)
    ours = torch.autograd.grad(OBJECTIVES["gspo"](s.batch(list(range(len(s.new)))), options, s.totals).loss, s.new)
    ratios = [(new - old).mean().exp() for new, old in zip(s.new, s.old, strict=True)]
    values = [torch.minimum(r * a, r.clamp(0.8, 1.28) * a) for r, a in zip(ratios, s.advantage, strict=True)]
    theirs = torch.autograd.grad(-torch.stack(values).mean(), s.new)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_a_token_of_weight_zero_has_no_gradient(name: str) -> None:
    s = Sequences.draw(3)
    batch = s.batch(list(range(len(s.new))))
    batch.weight = torch.zeros_like(batch.weight)
    gradients = torch.autograd.grad(OBJECTIVES[name](batch, options_of(name), s.totals).loss, s.new)
    assert not any(bool(gradient.any()) for gradient in gradients)


@given(SEEDS)
def test_kl_estimators_are_unbiased_or_bounded_as_they_claim(seed: int) -> None:
    """k1 and k3 average to the KL divergence under the policy; k3 is never negative; k2 is half the square of k1."""
    generator = torch.Generator().manual_seed(seed)
    policy, reference = torch.randn(2, 11, generator=generator, dtype=torch.float64).log_softmax(-1)
    divergence = (policy.exp() * (policy - reference)).sum()
    k1, k2, k3 = (kl_estimate(policy, reference, name) for name in ("k1", "k2", "k3"))  # type: ignore[arg-type]
    torch.testing.assert_close((policy.exp() * k1).sum(), divergence)
    torch.testing.assert_close((policy.exp() * k3).sum(), divergence)
    torch.testing.assert_close(k2, 0.5 * k1**2)
    assert bool((k3 >= 0).all())


@given(st.lists(st.lists(st.floats(-30, 30), min_size=1, max_size=6), min_size=1, max_size=4))
def test_kl_to_come_sums_to_the_end_of_each_sequence(sequences: list[list[float]]) -> None:
    result = kl_to_come(
        torch.tensor([v for s in sequences for v in s], dtype=torch.float64), torch.tensor([len(s) for s in sequences])
    )
    clamped = [[max(-10.0, min(10.0, v)) for v in s] for s in sequences]
    assert result.tolist() == pytest.approx([sum(s[t:]) for s in clamped for t in range(len(s))], abs=1e-9)


@pytest.mark.parametrize(
    ("level", "mode", "expected"),
    [
        ("token", "truncate", [2.0, 0.5, 1.0, 2.0]),
        ("token", "mask", [0.0, 0.5, 1.0, 2.0]),
        ("sequence", "truncate", [2.0, 2.0, 2.0, 2.0]),
        ("sequence", "mask", [2.0, 2.0, 2.0, 2.0]),
    ],
)
def test_importance_weights(level: str, mode: str, expected: list[float]) -> None:
    """Two sequences whose ratios are (4, ½) and (1, 2)."""
    old = torch.tensor([4.0, 0.5, 1.0, 2.0], dtype=torch.float64).log()
    options = ImportanceOptions("always", level, mode, cap=2.0 + 1e-9)  # type: ignore[arg-type]
    weights = importance_weights(
        old, torch.zeros(4, dtype=torch.float64), torch.tensor([0, 0, 1, 1]), torch.tensor([2, 2]), options
    )
    assert weights.tolist() == pytest.approx(expected)


def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="constant_length"):
        ObjectiveOptions("dr_grpo")
    with pytest.raises(ValueError, match="dual_clip"):
        ObjectiveOptions(dual_clip=0.5)
    with pytest.raises(ValueError, match="k3"):
        KLOptions(0.1, "loss", "k1")
    with pytest.raises(ValueError, match="cap"):
        ImportanceOptions(cap=0)
