"""Which attention the text part of a Hugging Face model uses; its vision part is left alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def set_text_attention(model: Any, name: str) -> str:
    """Switches to an attention that transformers knows by this name, and returns the name of the one before."""
    text = model.config.get_text_config()
    # a model without a vision part is its own text part, which transformers calls ""
    part = next((part for part in model.config.sub_configs if getattr(model.config, part) is text), "")
    before: str = text._attn_implementation
    model.set_attn_implementation({part: name})
    return before


@contextmanager
def text_attention(model: Any, name: str) -> Iterator[None]:
    """Switches as long as the context lasts."""
    before = set_text_attention(model, name)
    try:
        yield
    finally:
        set_text_attention(model, before)
