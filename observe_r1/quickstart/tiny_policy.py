"""Builds the quick start's tiny Qwen2.5-VL: the real classes of transformers, about a million parameters.

The tokenizer is byte-level, as Qwen's, so that any text encodes; the words of the quick start are one token each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AddedToken,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from observe_r1.quickstart.scenes import IMAGE_SIDE

POLICY_DIRECTORY = Path(__file__).parent / "policy"
"""The shipped warm-started policy, as `AutoProcessor` and `AutoModelForImageTextToText` load it."""

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TAGS = ("<observe>", "</observe>", "<think>", "</think>", "<answer>", "</answer>")
MAX_VOCABULARY = 512
HIDDEN, LAYERS, HEADS, KEY_VALUE_HEADS = 128, 3, 4, 2
VISION_HIDDEN, VISION_LAYERS = 64, 2
HEAD_SIZE = 32  # the smallest that every attention kernel of vLLM takes

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif item['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif item['type'] == 'text' %}{{ item['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(corpus: Iterable[str]) -> Qwen2Tokenizer:
    """A byte-level tokenizer with Qwen's rules whose merges are learnt from `corpus`."""
    rules = Qwen2Tokenizer()._tokenizer  # Qwen's own splitting rules
    learner = Tokenizer(models.BPE())
    learner.normalizer, learner.pre_tokenizer = normalizers.NFC(), rules.pre_tokenizer
    learner.decoder = decoders.ByteLevel()
    special = (END_OF_TEXT, TURN_START, TURN_END, *VISION_TOKENS)
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY - len(special) - len(TAGS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words = (part for text in corpus for part in re.split("|".join(map(re.escape, TAGS)), text))
    learner.train_from_iterator(words, trainer)
    learnt = json.loads(learner.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learnt["vocab"],
        merges=[tuple(merge) for merge in learnt["merges"]],
        unk_token=None,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        model_max_length=1024,
        padding_side="left",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [TURN_START, *VISION_TOKENS]})
    # Tags are ordinary tokens, so that decoding without special tokens keeps them.
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return tokenizer


def build_processor(corpus: Iterable[str]) -> Qwen2_5_VLProcessor:
    """The processor of the tiny policy. Every square picture becomes 16 visual tokens."""
    pixels = {"shortest_edge": IMAGE_SIDE**2, "longest_edge": IMAGE_SIDE**2}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=pixels),
        tokenizer=build_tokenizer(corpus),
        video_processor=Qwen2VLVideoProcessor(size=pixels),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: Qwen2Tokenizer, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """A randomly initialised policy in float32 for this tokenizer."""
    token_id = {token: tokenizer.convert_tokens_to_ids(token) for token in (END_OF_TEXT, TURN_END, *VISION_TOKENS)}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": HIDDEN,
            "intermediate_size": 3 * HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KEY_VALUE_HEADS,
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": None,
            "eos_token_id": token_id[TURN_END],
            "pad_token_id": token_id[END_OF_TEXT],
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": VISION_LAYERS,
            "hidden_size": VISION_HIDDEN,
            "intermediate_size": 2 * VISION_HIDDEN,
            "num_heads": VISION_HIDDEN // HEAD_SIZE,
            "out_hidden_size": HIDDEN,
            "fullatt_block_indexes": [VISION_LAYERS - 1],
        },
        image_token_id=token_id["<|image_pad|>"],
        video_token_id=token_id["<|video_pad|>"],
        vision_start_token_id=token_id["<|vision_start|>"],
        vision_end_token_id=token_id["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config).float()
    model.generation_config = GenerationConfig(
        eos_token_id=token_id[TURN_END], pad_token_id=token_id[END_OF_TEXT], do_sample=True, temperature=1.0, top_k=0
    )
    return model


def save_policy(
    model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, directory: Path | str
) -> None:
    """Write model and processor. The config says float32 and the file holds half precision: half the megabytes."""
    directory = Path(directory)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    weights = directory / "model.safetensors"
    half = {name: tensor.half() for name, tensor in load_file(weights).items()}
    save_file(half, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors writes private files; the policy is shipped


def load_policy(
    directory: Path | str = POLICY_DIRECTORY,
) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]:
    """Model in float32, ready to answer, and processor of a saved policy."""
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(directory)
