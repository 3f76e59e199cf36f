"""Prompts as the model reads them: chat template, image processing and the checks that belong to both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from observe_r1.experience import EncodedPrompt, Prompt, Skipped, VisionInputs

VIDEO = 2  # of `mm_token_type_ids`

SYSTEM_PROMPT = (
    "Look at the image before you reason. First write what you see that matters for the question inside "
    "<observe> </observe>, then reason step by step inside <think> </think>, and give only the final answer inside "
    "<answer> </answer>."
)


@dataclass(frozen=True)
class PromptOptions:
    """How a sample of the ladder becomes a prompt.

    Args:
        system_prompt: Put before samples that bring no system message of their own; null for none.
        max_prompt_tokens: Longer prompts are skipped and counted, never cut: cutting would cut images.
        min_pixels: Smaller images are scaled up to this many pixels; null keeps the processor's own limit.
        max_pixels: Larger images are scaled down to this many pixels; null keeps the processor's own limit.
    """

    system_prompt: str | None = SYSTEM_PROMPT
    max_prompt_tokens: int = 9216
    min_pixels: int | None = None
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        if self.max_prompt_tokens < 1:
            raise ValueError(f"prompt.max_prompt_tokens is {self.max_prompt_tokens}, but it must be at least 1.")
        for name, pixels in (("min_pixels", self.min_pixels), ("max_pixels", self.max_pixels)):
            if pixels is not None and pixels < 1:
                raise ValueError(f"prompt.{name} is {pixels}: use 1 or more, or null for the processor's own limit.")
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise ValueError(f"prompt.min_pixels ({self.min_pixels}) exceeds prompt.max_pixels ({self.max_pixels}).")


class PromptEncoder:
    """Encodes prompts with the policy's own processor. Picklable, so that loader workers can do the work."""

    def __init__(self, processor: Any, options: PromptOptions) -> None:
        self.processor = processor
        self.options = options
        self.placeholder = getattr(processor, "image_token", "<|image_pad|>")

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    def messages(self, prompt: Prompt) -> list[dict[str, Any]]:
        """Chat messages in the form chat templates take, with the configured system prompt where there is none."""
        messages = [dict(message) for message in prompt.messages]
        if self.options.system_prompt and not any(message["role"] == "system" for message in messages):
            messages.insert(0, {"role": "system", "content": self.options.system_prompt})
        return messages

    def encode(self, prompt: Prompt) -> EncodedPrompt | Skipped:
        """The prompt with every image processed once, or why it cannot be used."""
        text = self.processor.apply_chat_template(self.messages(prompt), tokenize=False, add_generation_prompt=True)
        if text.count(self.placeholder) != len(prompt.images):
            return Skipped(
                prompt.position,
                "image_count_mismatch",
                f"sample {prompt.id!r}: {text.count(self.placeholder)} image placeholders, {len(prompt.images)} images",
            )
        images = list(prompt.images) or None
        try:
            encoded = self.processor(text=[text], images=images, return_tensors="pt", return_mm_token_type_ids=True)
        except ValueError as error:  # the image processor refuses, for instance, an aspect ratio above 200
            return Skipped(prompt.position, "image_refused", f"sample {prompt.id!r}: {error}")
        token_ids, types = encoded["input_ids"][0], encoded["mm_token_type_ids"][0].to(torch.long)
        if bool((types == VIDEO).any()):
            return Skipped(
                prompt.position,
                "video_placeholder",
                f"sample {prompt.id!r}: its text has a place for a video",
            )
        if len(token_ids) > self.options.max_prompt_tokens:
            return Skipped(
                prompt.position,
                "prompt_too_long",
                f"sample {prompt.id!r}: {len(token_ids)} tokens, prompt.max_prompt_tokens is "
                f"{self.options.max_prompt_tokens}: raise it, or lower prompt.max_pixels",
            )
        vision = VisionInputs(encoded["pixel_values"], encoded["image_grid_thw"]) if images else None
        return EncodedPrompt(prompt, token_ids, types, vision)
