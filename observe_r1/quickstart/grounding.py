"""First stage of the warm start: the vision tower learns to see, and its visual tokens to point at words.

Every visual token is told whether its cell of the grid is empty, and the kind, colour and size of the shape in it.
Kinds and colours are read off by the embeddings of the words themselves, so that a word of a question and the shapes it
names lie in the same direction: finding them is then easy for attention. From the responses alone an untrained policy
does not start to look at the picture within minutes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from rich.progress import track
from torch import Tensor
from torch.nn import functional

from observe_r1.quickstart.questions import make_question
from observe_r1.quickstart.scenes import CELL, COLORS, GRID_SIDE, KINDS, RADII, Shape, paint

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "kind": ("empty", *KINDS),
    "color": ("empty", *COLORS),
    "size": ("empty", *RADII),
}
BATCH = 64  # scenes
LEARNING_RATE = 4e-3
SHARPNESS = 20.0  # of the cosines: three attributes share a direction, so none of them reaches 1


def cell_labels(shapes: Sequence[Shape]) -> Tensor:
    """Index of every attribute in every cell, [cells, attributes]; 0 where the cell is empty."""
    labels = torch.zeros(GRID_SIDE * GRID_SIDE, len(ATTRIBUTES), dtype=torch.long)
    for shape in shapes:
        x, y = shape.center
        cell = (y // CELL) * GRID_SIDE + x // CELL
        labels[cell] = torch.tensor([names.index(getattr(shape, name)) for name, names in ATTRIBUTES.items()])
    return labels


class Reader(torch.nn.Module):
    """Logits of the attributes of visual tokens: cosines with word embeddings, or with learnt vectors."""

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor) -> None:
        super().__init__()
        self.words = model.get_input_embeddings()
        vocabulary = processor.tokenizer.get_vocab()
        self.ids = {
            name: torch.tensor([vocabulary["Ġ" + word] for word in names[1:]])
            for name, names in ATTRIBUTES.items()
            if name != "size"
        }
        width = self.words.weight.shape[1]
        self.empty = torch.nn.Parameter(torch.randn(1, width) / width**0.5)
        self.sizes = torch.nn.Parameter(torch.randn(len(RADII), width) / width**0.5)

    def forward(self, seen: Tensor) -> list[Tensor]:
        vectors = [self.words(ids) for ids in self.ids.values()] + [self.sizes]
        directions = [functional.normalize(torch.cat([self.empty, rows]), dim=1) for rows in vectors]
        return [SHARPNESS * functional.normalize(seen, dim=1) @ rows.T for rows in directions]


def ground(model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, seed: int, steps: int) -> float:
    """Train the vision tower of `model` in place. Returns the share of attributes read rightly in the last batch."""
    reader = Reader(model, processor)
    tower = model.model.visual.train()
    parameters = [*tower.parameters(), *reader.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    accuracy = 0.0
    for step in track(range(steps), "Learning to see"):
        scenes = [make_question("warm_start", seed, step * BATCH + row).shapes for row in range(BATCH)]
        labels = torch.cat([cell_labels(shapes) for shapes in scenes])
        inputs = processor.image_processor([paint(shapes) for shapes in scenes], return_tensors="pt")
        seen = tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
        read = reader(seen)
        losses = [functional.cross_entropy(logits, labels[:, column]) for column, logits in enumerate(read)]
        torch.stack(losses).sum().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        filled = labels[:, 0] > 0
        right = torch.stack([logits.argmax(1) for logits in read], dim=1) == labels
        accuracy = float(right[filled].float().mean())
    return accuracy
