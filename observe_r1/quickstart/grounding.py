"""First stage of the warm start: the vision tower learns to see, one visual token per cell of the grid.

Every visual token says whether its cell is empty, and the kind, colour and size of the shape in it. This dense
supervision takes a minute; from the responses alone the tower of an untrained policy does not take off.
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


def cell_labels(shapes: Sequence[Shape]) -> Tensor:
    """Index of every attribute in every cell, [cells, attributes]; 0 where the cell is empty."""
    labels = torch.zeros(GRID_SIDE * GRID_SIDE, len(ATTRIBUTES), dtype=torch.long)
    for shape in shapes:
        x, y = shape.center
        cell = (y // CELL) * GRID_SIDE + x // CELL
        labels[cell] = torch.tensor([names.index(getattr(shape, name)) for name, names in ATTRIBUTES.items()])
    return labels


def ground(model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, seed: int, steps: int) -> float:
    """Train the vision tower of `model` in place. Returns the share of attributes read rightly in the last batch."""
    sizes = [len(names) for names in ATTRIBUTES.values()]
    head = torch.nn.Linear(model.config.text_config.hidden_size, sum(sizes))
    tower = model.model.visual.train()
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    accuracy = 0.0
    for step in track(range(steps), "Learning to see"):
        scenes = [make_question("warm_start", seed, step * BATCH + row).shapes for row in range(BATCH)]
        labels = torch.cat([cell_labels(shapes) for shapes in scenes])
        inputs = processor.image_processor([paint(shapes) for shapes in scenes], return_tensors="pt")
        seen = tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
        read = head(seen).split(sizes, dim=1)
        losses = [functional.cross_entropy(logits, labels[:, column]) for column, logits in enumerate(read)]
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        filled = labels[:, 0] > 0
        right = torch.stack([logits.argmax(1) for logits in read], dim=1) == labels
        accuracy = float(right[filled].float().mean())
    return accuracy
