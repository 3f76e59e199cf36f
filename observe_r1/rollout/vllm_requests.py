"""What the vLLM engines ask of vLLM, and how they read what it answers: the same in a process and over a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from observe_r1.experience import Completion, EncodedPrompt
from observe_r1.policy import Policy
from observe_r1.rollout.base import SamplingOptions

TEMPERATURES = (0.01, 2.0)  # vLLM refuses higher ones, and raises lower ones without a word


def check_sampling(sampling: SamplingOptions) -> None:
    """Raises:
    ValueError: Top-p is below 1, or the temperature is out of vLLM's range.
    """
    if sampling.top_p < 1:
        raise ValueError(
            f"sampling.top_p is {sampling.top_p}, and vLLM gives log-probs after the cut, which training cannot "
            "use: set it to 1, or sample with observe_r1.rollout.HFRollout."
        )
    if not sampling.greedy and not TEMPERATURES[0] <= sampling.temperature <= TEMPERATURES[1]:
        raise ValueError(
            f"sampling.temperature is {sampling.temperature}, and vLLM takes 0 or {TEMPERATURES[0]} to "
            f"{TEMPERATURES[1]}."
        )


def check_lengths(prompts: Sequence[EncodedPrompt], sampling: SamplingOptions, limit: int, remedy: str) -> None:
    """Raises:
    ValueError: A prompt with its completion may exceed the `limit` tokens vLLM was started for.
    """
    longest = max((prompt.token_ids.numel() for prompt in prompts), default=0)
    if longest + sampling.max_new_tokens > limit:
        raise ValueError(
            f"A prompt of {longest} tokens with sampling.max_new_tokens {sampling.max_new_tokens} does not fit into "
            f"the {limit} tokens that vLLM was started for: raise {remedy}, or lower sampling.max_new_tokens."
        )


def sampling_parameters(policy: Policy, sampling: SamplingOptions, seed: int, number: int) -> dict[str, Any]:
    """Arguments of `vllm.SamplingParams` for prompt `number` of a rollout."""
    return {
        "n": 1 if sampling.greedy else sampling.group_size,
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_new_tokens,
        # completion c of the prompt gets this seed + c
        "seed": int(np.random.SeedSequence([seed, number]).generate_state(1)[0]),
        "logprobs": 0,
        "detokenize": False,
        # added to the logits, so the probability is exactly 0
        "logit_bias": dict.fromkeys(policy.forbidden_token_ids, float("-inf")),
        "stop_token_ids": policy.end_token_ids.tolist(),
        "ignore_eos": True,  # what ends a completion is said in the line above
    }


def unexpanded_token_ids(prompt: EncodedPrompt) -> Tensor:
    """The ids of a prompt with one placeholder per image, as vLLM takes them: it expands them by itself."""
    if prompt.vision is None:
        return prompt.token_ids
    of_images = prompt.mm_token_type_ids == 1
    patches = prompt.vision.image_grid_thw.prod(dim=1)
    tokens = patches * int(of_images.sum()) // int(patches.sum())  # every token merges equally many patches
    kept = ~of_images
    kept[of_images.nonzero()[:, 0][tokens.cumsum(0) - tokens]] = True
    return prompt.token_ids[kept]


def check_prompt(prompt: EncodedPrompt, token_ids: Sequence[int], remedy: str) -> None:
    """Raises:
    RuntimeError: The token ids that vLLM read are not those of the trainer.
    """
    if list(token_ids) != prompt.token_ids.tolist():
        raise RuntimeError(
            f"vLLM read prompt {prompt.prompt.id!r} as {len(token_ids)} tokens, the trainer as "
            f"{prompt.token_ids.numel()}, or as different ones: their image processing differs. Check "
            f"that {remedy}, and that the prompt's images are its own."
        )


def read_completion(
    processor: Any, token_ids: Sequence[int], logprobs: Sequence[float], finish_reason: str | None
) -> Completion:
    """One answer of vLLM."""
    assert len(logprobs) == len(token_ids), "one log-prob per token has been asked for"
    tokens = torch.tensor(token_ids, dtype=torch.long)
    text = processor.decode(tokens, skip_special_tokens=True)
    return Completion(tokens, torch.tensor(logprobs, dtype=torch.float32), text, truncated=finish_reason == "length")


def as_group(completions: list[Completion], sampling: SamplingOptions) -> list[Completion]:
    """Of `group_size`: greedy completions are sampled once, as they are all the same."""
    return completions * (sampling.group_size // len(completions))


class TakenOver:
    """Whether the policy still has the weights that an engine took over."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._seen = self._changes()

    def check(self) -> None:
        """Raises:
        RuntimeError: The weights have been changed since.
        """
        if self._seen != self._changes():
            raise RuntimeError(
                "The policy has been trained since vLLM took over its weights: add "
                "observe_r1.callbacks.VLLMWeightSync to trainer.callbacks."
            )

    def _changes(self) -> list[int]:
        """How often each weight has been changed in place, which is how optimizers change them."""
        return [weight._version for weight in self._policy.parameters()]
