"""Responses of a careless annotator: what the quick-start policy is warm-started on.

A real supervised set holds annotations that are sometimes wrong, in ways that can be predicted. Here the annotator
overlooks small shapes when counting, takes a small shape for its look-alike when naming it, and now and then forgets a
tag. A policy that imitates this annotator has learnt to see (large and small shapes have different effects on what is
said), but says the right thing only part of the time: this is the headroom GRPO has in the quick start.
"""

from __future__ import annotations

import dataclasses
import random

from observe_r1.quickstart.questions import Question, Response
from observe_r1.quickstart.scenes import Shape

OVERLOOKED_SHARE = 0.6  # of the small shapes, when counting
MISREAD_SHARE = 0.6  # of the small shapes that have a look-alike, when naming
MALFORMED_SHARE = 0.1  # of the responses
LOOK_ALIKES = {
    "orange": "red",
    "red": "orange",
    "purple": "blue",
    "blue": "purple",
    "green": "black",
    "black": "green",
    "circle": "square",
    "square": "circle",
    "triangle": "cross",
    "cross": "triangle",
}


def annotate(question: Question, rng: random.Random) -> str:
    """A response text as the careless annotator writes it."""
    response = question.answer_from(_look(question, rng))
    return _malformed(response, rng) if rng.random() < MALFORMED_SHARE else response.text


def _look(question: Question, rng: random.Random) -> list[Shape]:
    if question.target is None:
        return [shape for shape in question.shapes if shape.size == "large" or rng.random() >= OVERLOOKED_SHARE]
    shapes = list(question.shapes)
    shape = shapes[question.target]
    if shape.size == "small" and rng.random() < MISREAD_SHARE:
        shapes[question.target] = (
            dataclasses.replace(shape, color=LOOK_ALIKES[shape.color])
            if question.family == "color"
            else dataclasses.replace(shape, kind=LOOK_ALIKES[shape.kind])
        )
    return shapes


def _malformed(response: Response, rng: random.Random) -> str:
    observe, think = f"<observe> {response.observe}</observe>", f"<think> {response.think}</think>"
    answer = f"<answer>{response.answer}</answer>"
    return rng.choice([think + answer, observe + answer, observe + think[: -len("</think>")] + answer])
