"""Answers of a policy to quick-start prompts, by plain batched `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from observe_r1.experience import Prompt
from observe_r1.quickstart.tiny_policy import VISION_TOKENS

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

MAX_NEW_TOKENS = 32  # the longest response of the annotator has 25


@dataclass(frozen=True, slots=True)
class Answered:
    """One response of the policy; `n_tokens` counts the end of the turn."""

    text: str
    n_tokens: int


class Sampler(Protocol):
    """Whatever answers prompts: `generate` here, or a rollout engine."""

    def __call__(self, prompts: Sequence[Prompt], n: int) -> list[list[Answered]]:
        """`n` responses to each prompt, in the order of the prompts."""
        ...


def encode(
    processor: Qwen2_5_VLProcessor, prompts: Sequence[Prompt], responses: Sequence[str] | None = None
) -> dict[str, Any]:
    """Model inputs of a batch. Without responses padded on the left, to generate; with them on the right, to train."""
    texts = processor.apply_chat_template([list(p.messages) for p in prompts], add_generation_prompt=True)
    if responses is not None:
        texts = [text + response for text, response in zip(texts, responses, strict=True)]
    side = "left" if responses is None else "right"
    images = [list(prompt.images) for prompt in prompts]
    batch = processor(text=texts, images=images, padding=True, padding_side=side, return_tensors="pt")
    return dict(batch)


class GenerateSampler:
    """Samples with `model.generate` at temperature 1, or greedily; vision tokens are forbidden."""

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        processor: Qwen2_5_VLProcessor,
        *,
        greedy: bool = False,
        batch_size: int = 512,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> None:
        self.model, self.processor = model, processor
        self.greedy, self.batch_size, self.max_new_tokens = greedy, batch_size, max_new_tokens

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], n: int) -> list[list[Answered]]:
        tokenizer = self.processor.tokenizer
        self.model.eval()
        answered: list[list[Answered]] = []
        per_batch = max(1, self.batch_size // n)
        for start in range(0, len(prompts), per_batch):
            inputs = encode(self.processor, prompts[start : start + per_batch])
            output = self.model.generate(
                **inputs,
                do_sample=not self.greedy,
                num_return_sequences=n,
                max_new_tokens=self.max_new_tokens,
                suppress_tokens=tokenizer.convert_tokens_to_ids(list(VISION_TOKENS)),
            )
            completions = output[:, inputs["input_ids"].shape[1] :]
            lengths = (completions != tokenizer.pad_token_id).sum(1).tolist()
            texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
            rows = [Answered(text, length) for text, length in zip(texts, lengths, strict=True)]
            answered += [rows[i : i + n] for i in range(0, len(rows), n)]
        return answered
