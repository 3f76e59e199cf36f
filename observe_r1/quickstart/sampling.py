"""Answers of the tiny policy to quick-start prompts, by the rollout engine that trains it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from rich.progress import track

from observe_r1.encoding import PromptEncoder, PromptOptions
from observe_r1.experience import EncodedPrompt, Prompt
from observe_r1.policy import Policy
from observe_r1.rollout import HFRollout, SamplingOptions

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

MAX_NEW_TOKENS = 32  # the longest response of the annotator has 25
SEQUENCES_PER_BATCH = 512


@dataclass(frozen=True, slots=True)
class Answered:
    """One response of the policy; `n_tokens` counts the end of the turn."""

    text: str
    n_tokens: int


class Sampler(Protocol):
    """Whatever answers prompts."""

    def __call__(self, prompts: Sequence[Prompt], n: int) -> list[list[Answered]]:
        """`n` responses to each prompt, in the order of the prompts."""
        ...


class PolicySampler:
    """Samples from a policy at temperature 1, or greedily. The same seed gives the same answers."""

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        processor: Qwen2_5_VLProcessor,
        *,
        greedy: bool = False,
        seed: int = 0,
    ) -> None:
        self._engine = HFRollout(SEQUENCES_PER_BATCH)
        self._engine.setup(Policy(model, processor.tokenizer.pad_token_id), processor.tokenizer)
        self._encoder = PromptEncoder(processor, PromptOptions(system_prompt=None))
        self._temperature = 0.0 if greedy else 1.0
        self._seed = seed

    def __call__(self, prompts: Sequence[Prompt], n: int) -> list[list[Answered]]:
        sampling = SamplingOptions(n, self._temperature, max_new_tokens=MAX_NEW_TOKENS)
        answered: list[list[Answered]] = []
        per_batch = max(1, SEQUENCES_PER_BATCH // n)  # also bounds how many pictures are encoded at the same time
        starts = range(0, len(prompts), per_batch)
        for start in track(starts, f"Answering {len(prompts)} questions, {n} times each"):
            encoded = [self._encode(prompt) for prompt in prompts[start : start + per_batch]]
            groups = self._engine.generate(encoded, sampling, self._seed + start)
            answered += [[Answered(one.text, len(one)) for one in group] for group in groups]
        return answered

    def _encode(self, prompt: Prompt) -> EncodedPrompt:
        encoded = self._encoder.encode(prompt)
        assert isinstance(encoded, EncodedPrompt), encoded
        return encoded
