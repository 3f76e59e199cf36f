"""Draws completions beside the picture they are about."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from observe_r1.experience import Prompt, PromptGroup

ROW_INCHES = 1.8  # ten lines of text
MAX_LINES = 7  # of a text in the picture, below its figures; the file beside it has all of it
QUESTION_LINES = 6  # with the gold and the figures below it a row is full
GREEN, RED, GREY = "#1a7f37", "#b42318", "#555555"


def draw_completions(groups: Sequence[PromptGroup], title: str) -> npt.NDArray[np.uint8]:
    """Picture [height, width, 3] with a row per group: image, question and figures, best and worst completion."""
    figure = Figure(figsize=(13, ROW_INCHES * len(groups) + 0.5), dpi=90)
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(f"Completions, {title}", x=0.01, y=0.995, ha="left", va="top", fontsize=12, weight="bold")
    top = 1 - 0.5 / (ROW_INCHES * len(groups) + 0.5)
    grid = figure.add_gridspec(
        len(groups), 4, width_ratios=[1, 1.7, 2.3, 2.3], left=0.01, right=0.99, bottom=0.02, top=top, wspace=0.06
    )
    for row, group in enumerate(groups):
        _draw_group(figure, grid, row, group)
    return pixels_of(canvas)


def pixels_of(canvas: FigureCanvasAgg) -> npt.NDArray[np.uint8]:
    """What is drawn, [height, width, 3]. A character that no font has is a box, and not a warning for each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _draw_group(figure: Figure, grid: object, row: int, group: PromptGroup) -> None:
    assert group.scores is not None
    axes = [figure.add_subplot(grid[row, column]) for column in range(4)]  # type: ignore[index]
    for axis in axes:
        axis.set_axis_off()
    prompt, scores = group.prompt.prompt, group.scores
    if prompt.images:
        axes[0].imshow(prompt.images[0])
    level = "unknown" if prompt.difficulty is None else f"{prompt.difficulty:.3f}"
    about = (
        f"{wrapped(question_of(prompt), 36, QUESTION_LINES)}\n\n{wrapped(f'gold: {prompt.gold.answer}', 36, 1)}\n"
        f"level {level}\npass rate {scores.pass_rate:.2f}   weight {scores.weight:.2f}"
    )
    axes[1].text(0, 0.98, about, va="top", fontsize=9, parse_math=False, clip_on=True)
    order = scores.reward.argsort(descending=True, stable=True).tolist()
    for axis, name, number in ((axes[2], "best", order[0]), (axes[3], "worst", order[-1])):
        completion = group.completions[number]
        colour = GREEN if bool(scores.correct[number]) else RED
        advantage = float(scores.advantage[number]) + 0.0  # no minus before a zero
        heading = f"{name}: reward {scores.reward[number]:.2f}   advantage {advantage:+.2f}"
        length = f"{len(completion)} tokens" + (", truncated" if completion.truncated else "")
        axis.text(0, 0.98, heading, va="top", fontsize=9, color=colour, weight="bold")
        axis.text(0, 0.84, length, va="top", fontsize=8, color=GREY)
        axis.text(0, 0.71, wrapped(completion.text, 52), va="top", fontsize=9, parse_math=False, clip_on=True)


def question_of(prompt: Prompt) -> str:
    """Text of the last user message, without its images."""
    for message in reversed(prompt.messages):
        if message["role"] == "user":
            content = message["content"]
            if isinstance(content, str):
                return content
            return " ".join(str(item["text"]) for item in content if item["type"] == "text")
    return ""


def wrapped(text: str, width: int, most: int = MAX_LINES) -> str:
    """The beginning of a text, in so many lines of this width at most."""
    enough = 2 * width * most  # of a completion that may be long, with room for spaces that are joined
    beginning = text if len(text) <= enough else text[:enough] + " …"
    return "\n".join(textwrap.wrap(beginning, width, max_lines=most, placeholder=" …"))
