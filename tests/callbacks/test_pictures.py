"""The completions table as a picture."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from observe_r1.answers import Gold
from observe_r1.callbacks.media.completions_picture import ROW_INCHES, draw_completions
from observe_r1.experience import Completion, EncodedPrompt, GroupScores, Prompt, PromptGroup

DPI = 90


def group(question: str, gold: str, text: str) -> PromptGroup:
    messages = [{"role": "user", "content": [{"type": "text", "text": question}]}]
    prompt = Prompt("id", "source", messages, [Image.new("RGB", (56, 56), "teal")], Gold(gold))  # type: ignore[arg-type]
    completions = [Completion(torch.zeros(3, dtype=torch.long), torch.zeros(3), text) for _ in range(2)]
    rewards = torch.tensor([1.0, 0.0])
    scores = GroupScores({}, rewards, *3 * [rewards.bool()], rewards, weight=1.0)
    return PromptGroup(EncodedPrompt(prompt, torch.zeros(3), torch.zeros(3)), completions, scores)


def test_a_long_row_leaves_the_next_one_alone() -> None:
    """Whatever stands in the first row, the pixels of the second are the same."""
    below = group("How many shapes are red?", "2", "<answer>2</answer>")
    sentence = "In the given figure the triangle ABC is inscribed in a circle of radius 5 cm. "
    pictures = [
        draw_completions([above, below], "step 1")
        for above in (group("How many?", "4", "4"), group(40 * sentence, 9 * sentence, 400 * sentence))
    ]
    second = round((0.5 + ROW_INCHES) * DPI) + 5  # between the rows there are 29 pixels
    assert not np.array_equal(*(picture[:second] for picture in pictures))
    np.testing.assert_array_equal(*(picture[second:] for picture in pictures))
