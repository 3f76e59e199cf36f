"""The loss of one micro-batch: objective, importance correction and the pull to the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from observe_r1.experience import MicroBatch
from observe_r1.objective import (
    OBJECTIVES,
    ImportanceOptions,
    KLOptions,
    ObjectiveOptions,
    ObjectiveTerms,
    TokenBatch,
    importance_weights,
    kl_estimate,
    kl_to_come,
)


def micro_batch_loss(
    batch: MicroBatch,
    logprobs: Tensor,
    objective: ObjectiveOptions,
    kl: KLOptions,
    importance: ImportanceOptions | None,
) -> tuple[Tensor, TokenBatch, ObjectiveTerms]:
    """The micro-batch's share of the loss of its optimizer step, with what the objective read and gave.

    Args:
        logprobs: [T] of the policy as it is now, with gradient.
        importance: Correction for a sampler that is not the trainer; None where there is nothing to correct.
    """
    old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
    sequence = torch.repeat_interleave(torch.arange(len(batch.lengths), device=old.device), batch.lengths)
    advantages = batch.advantages[sequence]
    weight = batch.trained[sequence]
    if importance is not None:
        weight = weight * importance_weights(old, batch.sampler_logprobs, sequence, batch.lengths, importance)
    if kl.coefficient > 0 and kl.placement == "reward":
        assert batch.reference_logprobs is not None
        distance = kl_estimate(old, batch.reference_logprobs, kl.estimator)
        advantages = advantages - kl.coefficient * kl_to_come(distance, batch.lengths)
    tokens = TokenBatch(logprobs, old, advantages, sequence, batch.lengths, weight)
    terms = OBJECTIVES[objective.name](tokens, objective, batch.totals)
    loss = terms.loss
    if kl.coefficient > 0 and kl.placement == "loss":
        assert batch.reference_logprobs is not None
        distance = kl_estimate(logprobs, batch.reference_logprobs, kl.estimator)
        loss = loss + kl.coefficient * (distance * terms.token_weight * weight).sum()
    return loss, tokens, terms
