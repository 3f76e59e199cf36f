"""Draws questions of a benchmark with their pictures, the response and the verdict."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from observe_r1.callbacks.media.completions_picture import (
    GREEN,
    GREY,
    RED,
    ROW_INCHES,
    pixels_of,
    question_of,
    wrapped,
)
from observe_r1.evaluation.predictions import Prediction
from observe_r1.experience import Prompt


def examples_of(predictions: Sequence[Prediction], rows: int) -> list[Prediction]:
    """As many right as wrong ones where there are, in the order of the questions."""
    asked = [prediction for prediction in predictions if prediction.refused is None]
    right = [prediction for prediction in asked if prediction.verdict.strict.is_right]
    wrong = [prediction for prediction in asked if not prediction.verdict.strict.is_right]
    of_right = min(len(right), max(rows - rows // 2, rows - len(wrong)))
    chosen = right[:of_right] + wrong[: rows - of_right]
    return sorted(chosen, key=lambda prediction: prediction.position)


def draw_examples(examples: Sequence[tuple[Prompt, Prediction]], title: str) -> npt.NDArray[np.uint8]:
    """Picture [height, width, 3] with a row per question: image, question and answer, response, what was read of it."""
    figure = Figure(figsize=(13, ROW_INCHES * len(examples) + 0.5), dpi=90)
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, y=0.995, ha="left", va="top", fontsize=12, weight="bold")
    top = 1 - 0.5 / (ROW_INCHES * len(examples) + 0.5)
    grid = figure.add_gridspec(
        len(examples), 4, width_ratios=[1, 2, 2.6, 1.4], left=0.01, right=0.99, bottom=0.02, top=top, wspace=0.06
    )
    for row, (prompt, prediction) in enumerate(examples):
        image, question, response, verdict = (figure.add_subplot(grid[row, column]) for column in range(4))
        for axis in (image, question, response, verdict):
            axis.set_axis_off()
        if prompt.images:
            image.imshow(prompt.images[0])
        length = f"{prediction.tokens} tokens" + (", truncated" if prediction.truncated else "")
        answer = f"{prediction.item.id}: {prediction.item.answer}"
        _write(question, wrapped(answer, 54, 1), wrapped(question_of(prompt), 46))
        _write(response, length, wrapped(prediction.response, 60))
        if len(prompt.images) > 1:
            image.set_title(f"the first of {len(prompt.images)} pictures", fontsize=8, color=GREY, loc="left")
        judged = prediction.verdict
        for number, (name, judgement) in enumerate((("strict", judged.strict), ("lenient", judged.lenient))):
            text = f"{name}: {judgement.outcome.name.lower().replace('_', ' ')}"
            colour = GREEN if judgement.is_right else RED
            verdict.text(0, 0.98 - 0.1 * number, text, va="top", fontsize=9, color=colour, weight="bold")
        read = wrapped(f"read: {judged.extraction}", 34, 7)
        verdict.text(0, 0.72, read, va="top", fontsize=9, parse_math=False, clip_on=True)
    return pixels_of(canvas)


def _write(axis: object, heading: str, text: str) -> None:
    axis.text(0, 0.98, heading, va="top", fontsize=8, color=GREY, parse_math=False, clip_on=True)  # type: ignore[attr-defined]
    axis.text(0, 0.84, text, va="top", fontsize=9, parse_math=False, clip_on=True)  # type: ignore[attr-defined]
