"""Vision-language models with random weights and prompts for them: what tests and benchmarks run on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers

from observe_r1.answers import Gold
from observe_r1.experience import EncodedPrompt, GroupSlice, Prompt, VisionInputs

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
VISION_START, VISION_END, IMAGE, VIDEO = 3, 4, 5, 6  # token ids; 0 pads, 1 and 2 end
FIRST_TEXT_TOKEN = 10


def build_model(
    family: str = "qwen2_5_vl",
    *,
    vocabulary: int = 128,
    hidden: int = 64,
    intermediate: int = 128,
    layers: int = 2,
    heads: int = 4,
    key_value_heads: int = 2,
    vision_hidden: int = 32,
    vision_intermediate: int = 64,
    vision_layers: int = 2,
    vision_heads: int = 2,
    window_size: int = 56,
    tied: bool = False,
    seed: int = 0,
) -> Any:
    """A model of one of `FAMILIES` in float32, with the real classes of transformers.

    `window_size` is in pixels; Qwen2.5-VL has 112, half of it gives the small images of tests several windows.
    """
    head_size = hidden // heads
    sections = [head_size // 8, (head_size // 2 - head_size // 8) // 2]
    sections.append(head_size // 2 - sum(sections))
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": sections}
    text = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "max_position_embeddings": 32_768,
        "rope_parameters": rope,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "tie_word_embeddings": tied,
    }
    token_ids = {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
        "tie_word_embeddings": tied,
    }
    tower: dict[str, Any] = {"depth": vision_layers, "num_heads": vision_heads}
    torch.manual_seed(seed)
    if family == "qwen2_vl":
        tower |= {"embed_dim": vision_hidden, "hidden_size": hidden, "mlp_ratio": vision_intermediate // vision_hidden}
        config = transformers.Qwen2VLConfig(text_config=text, vision_config=tower, **token_ids)
        return transformers.Qwen2VLForConditionalGeneration(config)
    tower |= {"hidden_size": vision_hidden, "intermediate_size": vision_intermediate, "out_hidden_size": hidden}
    if family == "qwen2_5_vl":
        tower |= {"window_size": window_size, "fullatt_block_indexes": [vision_layers - 1]}
        config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=tower, **token_ids)
        return transformers.Qwen2_5_VLForConditionalGeneration(config)
    if family == "qwen3_vl":
        text |= {"head_dim": head_size, "rope_parameters": {**rope, "mrope_interleaved": True}}
        tower |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 256, "patch_size": 16}
        config = transformers.Qwen3VLConfig(text_config=text, vision_config=tower, **token_ids)
        return transformers.Qwen3VLForConditionalGeneration(config)
    raise ValueError(f"No family {family!r}; there are {', '.join(FAMILIES)}.")


def medium_model() -> Any:
    """The model of the benchmarks: Qwen2.5-VL with 16.7 million parameters, 6.7 of them in the vision tower."""
    return build_model(
        vocabulary=8192,
        hidden=256,
        intermediate=1024,
        layers=8,
        heads=4,
        key_value_heads=2,
        vision_hidden=256,
        vision_intermediate=768,
        vision_layers=6,
        vision_heads=4,
        window_size=112,
        tied=True,
    )


def random_tokens(model: Any, count: int, generator: torch.Generator) -> torch.Tensor:
    """[count] ids of ordinary tokens."""
    return torch.randint(FIRST_TEXT_TOKEN, model.config.get_text_config().vocab_size, (count,), generator=generator)


def random_prompt(
    model: Any, text_tokens: int, grids: Sequence[tuple[int, int]], generator: torch.Generator
) -> EncodedPrompt:
    """A prompt of at least `text_tokens` text tokens and one image for each grid (height, width in patches)."""
    tower = model.config.vision_config
    patch = 3 * tower.temporal_patch_size * tower.patch_size**2
    ids, types = [random_tokens(model, text_tokens, generator)], [torch.zeros(text_tokens, dtype=torch.long)]
    for height, width in grids:
        placeholders = height * width // tower.spatial_merge_size**2
        ids += [torch.tensor([VISION_START, *[IMAGE] * placeholders, VISION_END]), random_tokens(model, 3, generator)]
        types.append(torch.tensor([0, *[1] * placeholders, 0, 0, 0, 0]))
    vision = None
    if grids:
        patches = sum(height * width for height, width in grids)
        pixels = torch.randn(patches, patch, generator=generator)
        vision = VisionInputs(pixels, torch.tensor([[1, height, width] for height, width in grids]))
    prompt = Prompt("random", "random", [], [], Gold("1"))
    return EncodedPrompt(prompt, torch.cat(ids), torch.cat(types), vision)


def random_group(
    model: Any,
    text_tokens: int,
    grids: Sequence[tuple[int, int]],
    completion_tokens: Sequence[int],
    generator: torch.Generator,
) -> GroupSlice:
    """A prompt and completions of the given lengths."""
    prompt = random_prompt(model, text_tokens, grids, generator)
    return GroupSlice(prompt, [random_tokens(model, count, generator) for count in completion_tokens])
