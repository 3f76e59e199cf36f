"""Where the shape of a model comes from: a directory, the hub's cache, a table, or the hub. Never its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from observe_r1.loading import locate

QWEN_2_5_VL: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "image_token_id": 151655,
    "video_token_id": 151656,
}
QWEN_2_5_TEXT: dict[str, Any] = {
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "max_position_embeddings": 128_000,
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [16, 24, 24]},
}
QWEN_2_5_TOWER: dict[str, Any] = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}


def _qwen_2_5(
    hidden: int, intermediate: int, layers: int, heads: int, key_value_heads: int, vocabulary: int, tied: bool
) -> dict[str, Any]:
    text = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }
    tower = {**QWEN_2_5_TOWER, "out_hidden_size": hidden}
    return {
        **QWEN_2_5_VL,
        "text_config": {**QWEN_2_5_TEXT, **text},
        "vision_config": tower,
        "tie_word_embeddings": tied,
    }


PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-VL-3B-Instruct": _qwen_2_5(2048, 11008, 36, 16, 2, 151_936, True),
    "Qwen/Qwen2.5-VL-7B-Instruct": _qwen_2_5(3584, 18944, 28, 28, 4, 152_064, False),
}
"""The config.json of models that people plan for before they download them, as far as it says what is computed."""

GENERATION = {"pad_token_id": 151643, "eos_token_id": [151645, 151643]}


def config_directory(pretrained: str, scratch: Path) -> str:
    """A directory or name from which transformers reads this model's config.

    Args:
        pretrained: Of the policy.
        scratch: An empty directory, for what is in the table.

    Raises:
        ValueError: The config is nowhere to be had.
    """
    from huggingface_hub import try_to_load_from_cache

    is_here = Path(pretrained).is_dir() or isinstance(try_to_load_from_cache(pretrained, "config.json"), str)
    if pretrained in PUBLISHED and not is_here:
        (scratch / "config.json").write_text(json.dumps(PUBLISHED[pretrained]))
        (scratch / "generation_config.json").write_text(json.dumps(GENERATION))
        return str(scratch)
    try:
        return locate(pretrained)
    except ValueError as error:
        raise ValueError(
            f"{error} A plan needs config.json alone (a few kB, no weights); without the network there are "
            f"{', '.join(PUBLISHED)}."
        ) from error
