"""Rollouts with the model that is being trained. Needs nothing else; the default."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from observe_r1.experience import Completion, EncodedPrompt
from observe_r1.policy import Policy
from observe_r1.ranks import largest_over_ranks
from observe_r1.rollout.base import RolloutEngine, SamplingOptions
from observe_r1.rollout.decoding import decode_groups


class HFRollout(RolloutEngine):
    """Samples with the policy itself.

    A completion depends on the seed, on the place of its prompt in the call and on its own number, not on the others.

    Args:
        sequences_per_batch: Number of completions that are generated at once; groups are not split.
        prompt_tokens_per_batch: Number of prompt tokens, images included, that pass through the model at once.
        keep_weights_whole: Under FSDP2, gather the weights once per call and keep them on every rank while it samples;
            false gathers them again for every token, block by block, in lockstep with the other ranks. DeepSpeed's
            ZeRO-3 always does that.
    """

    is_trainer = True

    def __init__(
        self,
        sequences_per_batch: int = 128,
        prompt_tokens_per_batch: int = 32_768,
        keep_weights_whole: bool = True,
    ) -> None:
        if sequences_per_batch < 1 or prompt_tokens_per_batch < 1:
            raise ValueError(
                f"rollout.sequences_per_batch is {sequences_per_batch} and rollout.prompt_tokens_per_batch "
                f"{prompt_tokens_per_batch}: both must be at least 1."
            )
        self.sequences_per_batch = sequences_per_batch
        self.prompt_tokens_per_batch = prompt_tokens_per_batch
        self.keep_weights_whole = keep_weights_whole
        self._policy: Policy | None = None
        self._processor: Any = None

    def setup(self, policy: Policy, processor: Any) -> None:
        self._policy, self._processor = policy, processor

    def generate(
        self, prompts: Sequence[EncodedPrompt], sampling: SamplingOptions, seed: int
    ) -> list[list[Completion]]:
        policy = self._policy
        if policy is None:
            raise RuntimeError("HFRollout.setup has not been called: the engine has no policy yet.")
        end = policy.end_token_ids
        generator = torch.Generator().manual_seed(seed)
        size = sampling.group_size
        groups: list[list[Completion]] = []
        whole = policy.kept_whole() if self.keep_weights_whole else nullcontext()
        with torch.no_grad(), _evaluating(policy), whole:
            batches = list(self.batches(prompts, size))
            if policy.in_lockstep:  # a rank with less to do decodes along with the others
                batches += [[]] * (largest_over_ranks(len(batches), policy.device) - len(batches))
            for batch in batches:
                if not batch:
                    decode_groups(policy, [policy.blank_prompt()], replace(sampling, group_size=1), end, None)
                    continue
                noise = None if sampling.greedy else _draw_noise(len(batch), sampling, generator)
                rows = zip(*decode_groups(policy, batch, sampling, end, noise), strict=True)
                completions = [self._completion(tokens, logprobs, end) for tokens, logprobs in rows]
                groups += [completions[first : first + size] for first in range(0, len(completions), size)]
        return groups

    def batches(self, prompts: Sequence[EncodedPrompt], group_size: int) -> Iterator[list[EncodedPrompt]]:
        """Consecutive prompts within both limits; a prompt that exceeds one alone comes alone."""
        batch: list[EncodedPrompt] = []
        tokens = 0
        for prompt in prompts:
            length = prompt.token_ids.numel()
            sequences = (len(batch) + 1) * group_size
            if batch and (sequences > self.sequences_per_batch or tokens + length > self.prompt_tokens_per_batch):
                yield batch
                batch, tokens = [], 0
            batch.append(prompt)
            tokens += length
        if batch:
            yield batch

    def _completion(self, tokens: Tensor, logprobs: Tensor, end: Tensor) -> Completion:
        ends = torch.isin(tokens, end).nonzero()
        length = int(ends[0]) + 1 if len(ends) else len(tokens)
        tokens = tokens[:length].clone()
        text = self._processor.decode(tokens, skip_special_tokens=True)
        return Completion(tokens, logprobs[:length].clone(), text, truncated=not len(ends))


def _draw_noise(prompts: int, sampling: SamplingOptions, generator: torch.Generator) -> Tensor:
    """[prompts x group_size, max_new_tokens] float64 of [0, 1), drawn prompt by prompt whatever the batch."""
    shape = (sampling.group_size, sampling.max_new_tokens)
    return torch.cat([torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(prompts)])


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
