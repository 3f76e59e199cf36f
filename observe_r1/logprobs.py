"""From hidden states to log-probabilities of tokens, without keeping anything of size tokens x vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from observe_r1.sharding import in_place_of_forward


@dataclass
class TokenLogprobs:
    """What a forward over completions gives, at their T tokens in order."""

    logprobs: Tensor  # [T] float32
    entropy: Tensor | None = None  # [T] float32, of the full distribution, no gradient


@dataclass(frozen=True)
class LogprobHead:
    """The last layer of the policy and the distribution that it defines.

    Args:
        module: Maps hidden states [T, H] to logits [T, V].
        forbidden: [F] token ids that cannot be sampled; they are left out of the distribution.
        temperature: Divides the logits.
        chunk_tokens: Number of tokens that have logits at once; the backward computes the logits again.
        with_entropy: The entropy is wanted too.
    """

    module: nn.Module
    forbidden: Tensor
    temperature: float
    chunk_tokens: int
    with_entropy: bool = False

    def __call__(self, hidden: Tensor, targets: Tensor) -> TokenLogprobs:
        """Log-probs [T] of `targets` from hidden states [T, H]."""
        logprobs, entropy = in_place_of_forward(self.module, self._logprobs, hidden, targets)
        return TokenLogprobs(logprobs, entropy if self.with_entropy else None)

    def _logprobs(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        weight = _weight_alone(self.module)
        if weight is None:
            return self._through_the_module(hidden, targets)
        if torch.is_autocast_enabled(hidden.device.type):
            # the backward runs outside of autocast, so the dtype is fixed here
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        found: tuple[Tensor, Tensor | None] = _LinearLogprobs.apply(hidden, weight, targets, self)  # type: ignore[no-untyped-call]
        return found

    def _through_the_module(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        logprobs, entropies = [], []
        for part in self.chunks(len(targets)):
            if torch.is_grad_enabled():
                chosen, entropy = checkpoint(
                    self._chunk, hidden[part], targets[part], use_reentrant=False, preserve_rng_state=False
                )
            else:
                chosen, entropy = self._chunk(hidden[part], targets[part])
            logprobs.append(chosen)
            entropies.append(entropy)
        return torch.cat(logprobs), torch.cat(entropies) if self.with_entropy else None

    def _chunk(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        distribution = sampling_logprobs(self.module(hidden), self.forbidden, self.temperature)
        chosen = distribution.gather(1, targets[:, None])[:, 0]
        return chosen, _entropy(distribution.detach()) if self.with_entropy else None

    def chunks(self, tokens: int) -> list[slice]:
        """At least one, so that no tokens give a result too."""
        return [slice(start, start + self.chunk_tokens) for start in range(0, max(tokens, 1), self.chunk_tokens)]


class _LinearLogprobs(torch.autograd.Function):
    """log softmax(h Wᵀ / temperature)[target], with logits made chunk by chunk, forward and backward.

    d log p(target) / d logits = (onehot(target) − p) / temperature, so the backward needs only the logits again and
    their log-sum-exp.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, head: LogprobHead
    ) -> tuple[Tensor, Tensor | None]:
        scores_of = _Scores(hidden, weight, head)
        logprobs = torch.empty(len(targets), dtype=scores_of.dtype, device=hidden.device)
        normaliser = torch.empty_like(logprobs)
        entropy = torch.empty_like(logprobs) if head.with_entropy else None
        second = torch.empty_like(scores_of.buffer) if head.with_entropy else None
        for part in head.chunks(len(targets)):
            scores = scores_of(part)
            chosen = scores.gather(1, targets[part, None])[:, 0]
            # by hand and in place: logsumexp takes memory of this size once more
            largest = scores.amax(dim=1)
            shifted = scores.sub_(largest[:, None])
            unnormalised = torch.exp(shifted, out=shifted if second is None else second[: len(shifted)])
            total = unnormalised.sum(dim=1)
            if entropy is not None:
                entropy[part] = total.log() - unnormalised.mul_(shifted).sum(dim=1) / total
            normaliser[part] = largest + total.log()
            logprobs[part] = chosen - normaliser[part]
        ctx.save_for_backward(hidden, weight, targets, normaliser)
        ctx.head = head
        if entropy is not None:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normaliser = ctx.saved_tensors
        scores_of = _Scores(hidden, weight, ctx.head)
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # summed over chunks in float32: half precision would round off what later chunks add
        of_weight = torch.zeros_like(weight, dtype=scores_of.dtype) if ctx.needs_input_grad[1] else None
        for part in ctx.head.chunks(len(targets)):
            upstream = gradient[part, None] / ctx.head.temperature
            of_scores = scores_of(part).sub_(normaliser[part, None]).exp_().mul_(-upstream)
            of_scores.scatter_add_(1, targets[part, None], upstream)
            of_logits = of_scores.to(hidden.dtype)
            if of_hidden is not None:
                of_hidden[part] = of_logits @ weight
            if of_weight is not None and of_weight.dtype == of_logits.dtype:
                of_weight.addmm_(of_logits.T, hidden[part])
            elif of_weight is not None:
                of_weight += of_logits.T @ hidden[part]
        return of_hidden, None if of_weight is None else of_weight.to(weight.dtype), None, None


class _Scores:
    """Logits / temperature of one chunk after the other, in float32 or wider, in the same memory.

    Fresh memory for every chunk would cost the CPU more time than the arithmetic on it. Forbidden tokens get the lowest
    number there is, not −inf: the entropy multiplies it with a probability of 0.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, head: LogprobHead) -> None:
        self.hidden, self.weight, self.head = hidden, weight, head
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)
        rows = min(head.chunk_tokens, len(hidden))
        self.buffer = torch.empty(rows, len(weight), dtype=self.dtype, device=hidden.device)

    def __call__(self, part: slice) -> Tensor:
        hidden = self.hidden[part]
        scores = self.buffer[: len(hidden)]
        if hidden.dtype == self.dtype:
            torch.mm(hidden, self.weight.T, out=scores)
        else:
            scores.copy_(hidden @ self.weight.T)
        if self.head.temperature != 1.0:
            scores.div_(self.head.temperature)
        return scores.index_fill_(1, self.head.forbidden, torch.finfo(self.dtype).min)


def is_a_product(module: nn.Module) -> bool:
    """It does nothing but multiply with its weight."""
    # FSDP2 makes a class of its own of what it gathers apart
    is_linear = type(module) is nn.Linear or (isinstance(module, nn.Linear) and isinstance(module, FSDPModule))
    return is_linear and getattr(module, "bias", None) is None


def _weight_alone(module: nn.Module) -> Tensor | None:
    """The weight, where the module is nothing but a product with it; adapters, biases and shards go through it."""
    if not is_a_product(module):
        return None
    layer: Any = module
    weight: Tensor = layer.weight
    whole = type(weight) is nn.Parameter and weight.shape == (layer.out_features, layer.in_features)
    whole = whole and not hasattr(weight, "ds_id")  # ZeRO-3 may take it apart again before the backward
    return weight if whole else None


def sampling_logprobs(logits: Tensor, forbidden: Tensor, temperature: float) -> Tensor:
    """log softmax of logits [..., V] / temperature without the forbidden tokens: what sampler and trainer share."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    return logits.index_fill(-1, forbidden, float("-inf")).log_softmax(-1)


def _entropy(distribution: Tensor) -> Tensor:
    """Entropy of log-probs [..., V]; forbidden tokens, at -inf, have probability 0 and must not become nan."""
    return -(distribution.exp() * distribution.clamp(min=torch.finfo(distribution.dtype).min)).sum(-1)
