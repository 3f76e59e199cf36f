"""A prompt of a given size, as the model reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from observe_r1.answers import Gold
from observe_r1.encoding import PromptOptions
from observe_r1.experience import EncodedPrompt, Prompt, VisionInputs
from observe_r1.loading import load_processor
from observe_r1.planning.options import PlanOptions

TEXT_TOKEN = 7  # any that is no placeholder of an image
QWEN_PIXELS = (56 * 56, 28 * 28 * 16_384)
"""Least and most pixels of an image in the processors that Qwen publishes."""


def pixel_limits(directory: str, options: PromptOptions) -> tuple[int, int]:
    """Least and most pixels of an image: the configured ones, or those of the model's own processor if it is here."""
    least, most = QWEN_PIXELS
    if options.min_pixels is None or options.max_pixels is None:
        try:
            size = load_processor(directory, options).image_processor.size
            least, most = int(size.shortest_edge), int(size.longest_edge)
        except (OSError, ValueError, AttributeError):  # a config alone
            pass
    return options.min_pixels or least, options.max_pixels or most


def image_grid(config: Any, pixels: int, limits: tuple[int, int]) -> tuple[int, int]:
    """Height and width, in patches, of a square image of so many pixels, by the model's own rule.

    Args:
        config: Of the model.
        limits: Least and most pixels, to which images are scaled.
    """
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    tower, side = config.vision_config, max(round(pixels**0.5), 1)
    factor = tower.patch_size * tower.spatial_merge_size
    height, width = smart_resize(side, side, factor=factor, min_pixels=limits[0], max_pixels=limits[1])
    return height // tower.patch_size, width // tower.patch_size


def planned_prompt(
    config: Any,
    plan: PlanOptions,
    options: PromptOptions,
    limits: tuple[int, int],
    empty: Callable[..., Tensor] = torch.empty,
) -> EncodedPrompt:
    """The prompt that a plan is made for; its text is cut to what `max_prompt_tokens` leaves.

    Args:
        empty: Makes the pixels.

    Raises:
        ValueError: The images alone are too much, so such a sample would be skipped.
    """
    tower: Any = getattr(config, "vision_config", None)
    images = 0 if tower is None else plan.images
    placeholders, vision = torch.zeros(0, dtype=torch.long), None
    if images:
        height, width = image_grid(config, plan.image_pixels or limits[1], limits)
        one = torch.full((height * width // tower.spatial_merge_size**2,), config.image_token_id)
        marks = torch.tensor([config.vision_start_token_id]), torch.tensor([config.vision_end_token_id])
        placeholders = torch.cat([marks[0], one, marks[1]]).repeat(images)
        patch = getattr(tower, "in_channels", 3) * tower.temporal_patch_size * tower.patch_size**2
        pixels = empty(images * height * width, patch, dtype=torch.float32)
        vision = VisionInputs(pixels, torch.tensor([[1, height, width]] * images))
    text = min(plan.text_tokens, options.max_prompt_tokens - len(placeholders))
    if text < 1:
        raise ValueError(
            f"{images} image(s) of {plan.image_pixels or limits[1]:,} pixels are {len(placeholders):,} tokens, and "
            f"model.prompt.max_prompt_tokens is {options.max_prompt_tokens:,}: such samples would be skipped. Set "
            "plan.image_pixels to the size of your images, or model.prompt.max_pixels to a smaller one."
        )
    token_ids = torch.cat([placeholders, torch.full((text,), TEXT_TOKEN)])
    types = (token_ids == config.image_token_id).long() if images else torch.zeros_like(token_ids)
    return EncodedPrompt(Prompt("planned", "plan", [], [], Gold("none")), token_ids, types, vision)
