"""What a Hugging Face vision-language model reads of a prompt beside its tokens: rotary positions and images."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from observe_r1.experience import EncodedPrompt, ImageFeatures, VisionInputs


def prompt_positions(backbone: Any, prompt: EncodedPrompt) -> Tensor:
    """Rotary positions [3, P] of a prompt by the model's own rule, or [1, P] for models without multimodal positions.

    A completion continues with max(positions) + 1 in every row.
    """
    device, length = prompt.token_ids.device, prompt.token_ids.numel()
    if not hasattr(backbone, "get_rope_index"):
        return torch.arange(length, device=device)[None]
    if prompt.vision is None:
        return torch.arange(length, device=device).expand(3, length)
    positions, _ = backbone.get_rope_index(
        prompt.token_ids[None],
        mm_token_type_ids=prompt.mm_token_type_ids[None],
        image_grid_thw=prompt.vision.image_grid_thw,
    )
    return torch.as_tensor(positions[:, 0])


def vision_arguments(visions: Iterable[VisionInputs | None]) -> dict[str, Any]:
    """Keyword arguments of the model for the images of a batch, in the order of their placeholders.

    Either all prompts bring the features of their images or none does.
    """
    present = [vision for vision in visions if vision is not None]
    if not present:
        return {}
    grids = torch.cat([vision.image_grid_thw for vision in present])
    features = [vision.features for vision in present if vision.features is not None]
    if features:
        assert len(features) == len(present), "image features of some prompts are missing"
        return {"mm_encoder_outputs": {"image": _EncoderOutput.of(features)}, "image_grid_thw": grids}
    pixels = [vision.pixel_values for vision in present]
    return {"pixel_values": pixels[0] if len(pixels) == 1 else torch.cat(pixels), "image_grid_thw": grids}


def takes_image_features(backbone: Any) -> bool:
    """Whether the model can be handed the output of its vision tower (transformers 5.18 and later)."""
    return "mm_encoder_outputs" in inspect.signature(backbone.forward).parameters


def encode_images(backbone: Any, prompt: EncodedPrompt) -> EncodedPrompt:
    """The prompt with the output of the vision tower in place of a later run of it, without gradient.

    One prompt at a time, so that a prompt has the same features to the last bit whatever it is batched with.
    """
    vision = prompt.vision
    if vision is None or vision.features is not None:
        return prompt
    device = next(backbone.parameters()).device
    with torch.no_grad():
        output = backbone.get_image_features(
            vision.pixel_values.to(device), vision.image_grid_thw.to(device), return_dict=True
        )
    home = vision.pixel_values.device
    features = ImageFeatures(
        [image.to(home) for image in output.pooler_output],
        [[image.to(home) for image in layer] for layer in getattr(output, "deepstack_features", None) or []],
    )
    return dataclasses.replace(prompt, vision=dataclasses.replace(vision, features=features))


@dataclasses.dataclass
class _EncoderOutput:
    """What the models read of a vision tower's output when it is handed to them."""

    pooler_output: list[Tensor]
    deepstack_features: list[list[Tensor]]

    @classmethod
    def of(cls, features: list[ImageFeatures]) -> _EncoderOutput:
        layers = zip(*(item.deepstack for item in features), strict=True)
        return cls(
            [image for item in features for image in item.images],
            [[image for images in layer for image in images] for layer in layers],
        )
