"""What it costs to train on a prompt and its completions, so that work can be dealt out evenly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GroupCost:
    """What the completions of one prompt cost, in token equivalents."""

    prompt: float  # once in every micro-batch that has completions of the group
    completions: list[float]


@dataclass(frozen=True)
class TokenCost:
    """Cost in token equivalents: 1 is what the linear layers of the text model take for one token.

    A prompt of P tokens that passes through the model once, with images of n_i patches, and a completion of C tokens
    that attends to it cost

        P + attention * P² / 2 + Σ_i (vision * n_i + vision_attention * n_i²)
        C * (1 + head) + attention * (C * P + C² / 2)

    The coefficients are ratios of FLOPs counted as in PaLM (https://arxiv.org/abs/2204.02311, appendix B): 2 for every
    weight of a linear layer and token, 4 * heads * head size for every layer and pair of query and key. A backward
    takes twice the forward and checkpointing another forward, of every part alike, so the ratios hold for training.
    Norms, embeddings of tokens and patches, the patch merger and padding are left out.

    Args:
        attention: Of the text model, for one pair of query and key.
        head: Of the output layer, for one completion token.
        vision: Of the vision tower, for one patch.
        vision_attention: Of the vision tower, for one pair of patches of an image.
        repeated_prompts: The model runs a prompt again for each of its completions instead of sharing it.
    """

    attention: float = 0.0
    head: float = 0.0
    vision: float = 0.0
    vision_attention: float = 0.0
    repeated_prompts: bool = False

    @classmethod
    def of(cls, config: Any, *, vision: bool = True, repeated_prompts: bool = False) -> TokenCost:
        """Coefficients of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL model, or of a text model, by its Hugging Face config.

        Args:
            vision: The tower runs in every forward and is trained; False: it is frozen or its output is kept.
        """
        text = config.get_text_config()
        heads, hidden = text.num_attention_heads, text.hidden_size
        head_size = getattr(text, "head_dim", None) or hidden // heads
        unit = token_flops(config)
        tower = getattr(config, "vision_config", None)
        per_patch, per_pair = _tower_flops(tower) if vision and tower is not None else (0.0, 0.0)
        return cls(
            attention=4 * text.num_hidden_layers * heads * head_size / unit,
            head=2 * hidden * text.vocab_size / unit,
            vision=per_patch / unit,
            vision_attention=per_pair / unit,
            repeated_prompts=repeated_prompts,
        )

    def prompt(self, tokens: int, patches: Sequence[int] = ()) -> float:
        """Of a prompt that passes through the model once, with the number of patches of each of its images."""
        images = sum(self.vision * count + self.vision_attention * count**2 for count in patches)
        return tokens + self.attention * tokens**2 / 2 + images

    def completion(self, prompt_tokens: int, tokens: int) -> float:
        """Of a completion, without its prompt."""
        return tokens * (1 + self.head) + self.attention * (tokens * prompt_tokens + tokens**2 / 2)

    def group(self, prompt_tokens: int, patches: Sequence[int], completion_tokens: Sequence[int]) -> GroupCost:
        """Of completions that share a prompt, or where prompts are repeated, of completions that each bring theirs."""
        prompt = self.prompt(prompt_tokens, patches)
        completions = [self.completion(prompt_tokens, tokens) for tokens in completion_tokens]
        if self.repeated_prompts:
            return GroupCost(0.0, [prompt + cost for cost in completions])
        return GroupCost(prompt, completions)


def token_flops(config: Any) -> int:
    """Forward FLOPs of one token equivalent: those of the linear layers of the text model for one token."""
    text = config.get_text_config()
    heads, hidden = text.num_attention_heads, text.hidden_size
    head_size = getattr(text, "head_dim", None) or hidden // heads
    weights = hidden * head_size * 2 * (heads + text.num_key_value_heads) + 3 * hidden * text.intermediate_size
    return int(2 * text.num_hidden_layers * weights)


def _tower_flops(tower: Any) -> tuple[float, float]:
    """Forward FLOPs of the blocks of a vision tower: for one patch, and for one pair of patches of an image."""
    hidden = getattr(tower, "embed_dim", tower.hidden_size)  # Qwen2-VL calls the size of its output hidden_size
    intermediate = getattr(tower, "intermediate_size", None) or hidden * tower.mlp_ratio
    pair = 4 * hidden
    if not hasattr(tower, "fullatt_block_indexes"):
        return 2 * tower.depth * (4 * hidden**2 + 2 * hidden * intermediate), tower.depth * pair
    # Qwen2.5-VL: the MLP has a gate, and all but a few layers attend within windows, the same for every patch
    full = len(tower.fullatt_block_indexes)
    window = (tower.window_size // tower.patch_size) ** 2
    linear = 2 * tower.depth * (4 * hidden**2 + 3 * hidden * intermediate)
    return linear + (tower.depth - full) * window * pair, full * pair
