"""The losses: probability ratios, clipping, KL estimators and how tokens are added up.

Every objective is one pure function of the T completion tokens of a micro-batch. It returns the *sum* of their terms
over the denominators of the whole optimizer step (`StepTotals`), so that adding up micro-batches and ranks gives the
loss of the step exactly, whatever the split. The gradient of a completion that is not trained is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from observe_r1.experience import StepTotals

KL_LIMIT = 10.0  # per-token clamp of the KL in the reward, as in the release
LOG_RATIO_LIMIT = 20.0  # exp(20) is far outside every clip range; keeps exp() finite

ReferenceOffload = Literal["none", "model", "blocks"]
ObjectiveName = Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo"]


@dataclass(frozen=True)
class ObjectiveOptions:
    """Which loss is minimised.

    Args:
        name: `grpo` mean per sequence, then over sequences; `dapo` mean over all tokens of the step; `dr_grpo` sum over
            tokens by a constant length; `gspo` sequence-level ratio; `cispo` clipped weight times log-probability.
        epsilon_low: The ratio is clipped below 1 − epsilon_low.
        epsilon_high: The ratio is clipped above 1 + epsilon_high.
        dual_clip: Lower bound of the objective at negative advantages, in multiples of |A|; null for none.
        constant_length: Denominator per sequence of `dr_grpo`, usually max_new_tokens.
    """

    name: ObjectiveName = "dapo"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    dual_clip: float | None = None
    constant_length: int | None = None

    def __post_init__(self) -> None:
        if self.name == "dr_grpo" and not self.constant_length:
            raise ValueError(
                "objective.name is dr_grpo, which needs objective.constant_length: set it to max_new_tokens."
            )
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"objective.dual_clip is {self.dual_clip}, but it must be greater than 1 (3 is usual).")
        if self.epsilon_low < 0 or self.epsilon_high < 0:
            raise ValueError(f"objective.epsilon_low/high are {self.epsilon_low}/{self.epsilon_high}: use values ≥ 0.")


@dataclass(frozen=True)
class KLOptions:
    """The pull towards the reference model.

    Args:
        coefficient: β; 0 for none, and then no reference model is loaded.
        placement: `reward` subtracts the KL to come from the advantage of each token (the release); `loss` adds it to
            the loss (GRPO as published).
        reference_offload: Where the reference model is while it is not used: on the device (`none`), or in the memory
            of the CPU, from where it is fetched for its passes over a rollout whole (`model`), or in every pass one
            block at a time (`blocks`), which needs the least memory and the most time. With adapters there is no
            reference model, and sharded strategies spread it as they spread the policy.
        estimator: `k1` log π − log π_ref; `k2` half its square; `k3` exp(−k1) − 1 + k1 (http://joschu.net/blog/kl-approx.html).
    """

    coefficient: float = 0.0
    placement: Literal["reward", "loss"] = "reward"
    estimator: Literal["k1", "k2", "k3"] = "k1"
    reference_offload: ReferenceOffload = "none"

    def __post_init__(self) -> None:
        if self.coefficient < 0:
            raise ValueError(f"kl.coefficient is {self.coefficient}, but it cannot be negative: use 0 for no KL term.")
        if self.coefficient > 0 and self.placement == "loss" and self.estimator == "k1":
            raise ValueError(
                "kl.estimator k1 has no useful gradient in the loss (its expectation is zero): use k3 (GRPO) or k2, or "
                "kl.placement: reward."
            )


@dataclass(frozen=True)
class ImportanceOptions:
    """Correction for a sampler that is not the trainer (vLLM, or an older policy): weights π_old / π_sampler.

    Args:
        correction: `auto` corrects when the rollout engine is not the trainer's own model; `always`; `never`.
        level: `token` weighs each token by its own ratio, `sequence` all tokens of a completion by their product.
        mode: `truncate` caps the weight at `cap`; `mask` drops what exceeds it.
        cap: C, the largest weight.
    """

    correction: Literal["auto", "always", "never"] = "auto"
    level: Literal["token", "sequence"] = "token"
    mode: Literal["truncate", "mask"] = "truncate"
    cap: float = 2.0

    def __post_init__(self) -> None:
        if self.cap <= 0:
            raise ValueError(f"importance.cap is {self.cap}, but it must be positive (2 is usual).")


@dataclass
class TokenBatch:
    """The T completion tokens of a micro-batch, N sequences back to back."""

    logprobs: Tensor  # [T] of the policy being trained, with gradient
    old_logprobs: Tensor  # [T] of the policy that the rollout was made with
    advantages: Tensor  # [T]
    sequence: Tensor  # [T] long, number of the sequence a token belongs to
    lengths: Tensor  # [N] tokens per sequence
    weight: Tensor  # [T] importance weight; 0 leaves a token out of the loss


@dataclass
class ObjectiveTerms:
    """The loss of a micro-batch and what is worth logging about it."""

    loss: Tensor  # scalar, its share of the loss of the optimizer step
    clipped: Tensor  # [T] bool, tokens whose gradient the clipping stopped
    token_weight: Tensor  # [T] how much each token counts, also for a KL term in the loss


def _log_ratio(tokens: TokenBatch) -> Tensor:
    return (tokens.logprobs - tokens.old_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def _clipped_surrogate(ratio: Tensor, advantages: Tensor, options: ObjectiveOptions) -> tuple[Tensor, Tensor]:
    """−min(r·A, clip(r)·A) per token, with the dual clip where asked for, and where the clip is what counts."""
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - options.epsilon_low, 1 + options.epsilon_high) * advantages
    value, stopped = torch.minimum(unclipped, clipped), clipped < unclipped
    if options.dual_clip is not None:
        bound = options.dual_clip * advantages
        beyond = (advantages < 0) & (value < bound)
        value, stopped = torch.where(beyond, bound, value), stopped | beyond
    return -value, stopped


def _sequence_mean(tokens: TokenBatch, totals: StepTotals) -> Tensor:
    """1 / (|o_i| · sequences) per token: mean over tokens of a sequence, then over sequences."""
    return 1.0 / (tokens.lengths[tokens.sequence].to(tokens.logprobs.dtype) * totals.sequences)


def _token_mean(tokens: TokenBatch, totals: StepTotals) -> Tensor:
    """1 / tokens per token: every token of the step counts the same."""
    return torch.full_like(tokens.logprobs, 1.0 / totals.tokens)


def _add_up(per_token: Tensor, stopped: Tensor, token_weight: Tensor, tokens: TokenBatch) -> ObjectiveTerms:
    return ObjectiveTerms((per_token * token_weight * tokens.weight).sum(), stopped, token_weight)


def grpo(tokens: TokenBatch, options: ObjectiveOptions, totals: StepTotals) -> ObjectiveTerms:
    """1/N Σ_i 1/|o_i| Σ_t −min(r A, clip(r) A). DeepSeekMath (arXiv 2402.03300), equation 3."""
    per_token, stopped = _clipped_surrogate(_log_ratio(tokens).exp(), tokens.advantages, options)
    return _add_up(per_token, stopped, _sequence_mean(tokens, totals), tokens)


def dapo(tokens: TokenBatch, options: ObjectiveOptions, totals: StepTotals) -> ObjectiveTerms:
    """1/Σ_i|o_i| Σ_i Σ_t −min(r A, clip(r) A). DAPO (arXiv 2503.14476), equation 8; Observe-R1 where ε_low = ε_high."""
    per_token, stopped = _clipped_surrogate(_log_ratio(tokens).exp(), tokens.advantages, options)
    return _add_up(per_token, stopped, _token_mean(tokens, totals), tokens)


def dr_grpo(tokens: TokenBatch, options: ObjectiveOptions, totals: StepTotals) -> ObjectiveTerms:
    """1/(N·L) Σ_i Σ_t −min(r A, clip(r) A), L constant. Dr. GRPO (arXiv 2503.20783), with `advantage.scale: none`."""
    assert options.constant_length is not None
    per_token, stopped = _clipped_surrogate(_log_ratio(tokens).exp(), tokens.advantages, options)
    weight = torch.full_like(tokens.logprobs, 1.0 / (options.constant_length * totals.sequences))
    return _add_up(per_token, stopped, weight, tokens)


def gspo(tokens: TokenBatch, options: ObjectiveOptions, totals: StepTotals) -> ObjectiveTerms:
    """1/N Σ_i −min(s A, clip(s) A), s = (π/π_old)^(1/|o_i|). GSPO (arXiv 2507.18071), equation 5.

    Written per token (GSPO-token, equation 13 there), with the same value and gradient: advantages may differ by token.
    """
    log_ratio = _log_ratio(tokens)
    summed = torch.zeros(len(tokens.lengths), dtype=log_ratio.dtype, device=log_ratio.device)
    mean = summed.index_add(0, tokens.sequence, log_ratio.detach()) / tokens.lengths
    ratio = (mean[tokens.sequence] + log_ratio - log_ratio.detach()).exp()
    per_token, stopped = _clipped_surrogate(ratio, tokens.advantages, options)
    return _add_up(per_token, stopped, _sequence_mean(tokens, totals), tokens)


def cispo(tokens: TokenBatch, options: ObjectiveOptions, totals: StepTotals) -> ObjectiveTerms:
    """1/Σ_i|o_i| Σ_i Σ_t −sg[min(r, 1 + ε_high)] A log π. CISPO (MiniMax-M1, arXiv 2506.13585), equation 4.

    Only the upper bound clips, as in the paper's experiments; a clipped token keeps a gradient.
    """
    ratio = _log_ratio(tokens).detach().exp()
    capped = ratio.clamp(max=1 + options.epsilon_high)
    return _add_up(-capped * tokens.advantages * tokens.logprobs, ratio > capped, _token_mean(tokens, totals), tokens)


OBJECTIVES: dict[str, Callable[[TokenBatch, ObjectiveOptions, StepTotals], ObjectiveTerms]] = {
    "grpo": grpo,
    "dapo": dapo,
    "dr_grpo": dr_grpo,
    "gspo": gspo,
    "cispo": cispo,
}


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """Estimate of KL(π ‖ π_ref) at tokens sampled from π, [T]."""
    log_ratio = logprobs - reference_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    return torch.expm1((-log_ratio).clamp(max=LOG_RATIO_LIMIT)) + log_ratio


def kl_to_come(kl: Tensor, lengths: Tensor) -> Tensor:
    """Σ_{s ≥ t} kl_s within each sequence, [T], after the clamp: what KL in the reward takes from an advantage."""
    clamped = kl.clamp(-KL_LIMIT, KL_LIMIT)
    return torch.cat([part.flip(0).cumsum(0).flip(0) for part in clamped.split(lengths.tolist())])


def importance_weights(
    old_logprobs: Tensor, sampler_logprobs: Tensor, sequence: Tensor, lengths: Tensor, options: ImportanceOptions
) -> Tensor:
    """Weights [T] by which the loss corrects for the sampler, π_old / π_sampler truncated or masked at the cap.

    Truncated importance sampling as in https://fengyao.notion.site/off-policy-rl.
    """
    log_ratio = old_logprobs - sampler_logprobs
    if options.level == "sequence":
        summed = torch.zeros(len(lengths), dtype=log_ratio.dtype, device=log_ratio.device)
        log_ratio = summed.index_add(0, sequence, log_ratio)[sequence]
    weight = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    if options.mode == "truncate":
        return weight.clamp(max=options.cap)
    return torch.where(weight > options.cap, 0.0, weight)
