"""The synthetic questions: the same everywhere, right by a recount of the pixels, and in the format."""

from __future__ import annotations

import random
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from observe_r1.answers import answer_content, is_well_formed
from observe_r1.quickstart.annotations import MALFORMED_SHARE, annotate
from observe_r1.quickstart.pass_rates import is_correct
from observe_r1.quickstart.questions import FAMILIES, make_question
from observe_r1.quickstart.scenes import BACKGROUND, COLORS, IMAGE_SIDE, KINDS, paint, place

QUESTIONS = [make_question("train", 0, index) for index in range(300)]


def blobs(image: Image.Image) -> list[tuple[str, str]]:
    """(kind, color) of every connected blob, read off the pixels alone."""
    pixels = np.asarray(image)
    names = {rgb: name for name, rgb in COLORS.items()}
    waiting = {(int(y), int(x)) for y, x in np.argwhere((pixels != BACKGROUND).any(axis=2))}
    found = []
    while waiting:
        blob, edge = set(), [min(waiting)]
        waiting.remove(edge[0])
        while edge:
            y, x = edge.pop()
            blob.add((y, x))
            near = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & waiting
            waiting -= near
            edge += near
        (color,) = {names[tuple(int(value) for value in pixels[place])] for place in blob}
        found.append((kind_of(blob), color))
    return found


def kind_of(blob: set[tuple[int, int]]) -> str:
    """A square fills its corners; a triangle the lower ones, roughly; a cross fills less than half of its box."""
    rows, columns = [y for y, _ in blob], [x for _, x in blob]
    top, bottom, left, right = min(rows), max(rows), min(columns), max(columns)
    if len(blob) == (bottom - top + 1) * (right - left + 1):
        return "square"
    if (bottom, left) in blob:
        return "triangle"
    share = len(blob) / ((bottom - top + 1) * (right - left + 1))
    return "circle" if share > 0.65 else "cross"


def recount(text: str, seen: list[tuple[str, str]]) -> str:
    """The answer to a question, from its words and the blobs."""
    words = re.findall(r"\w+", text)
    kinds = [word for word in words if word in KINDS]
    colors = [word for word in words if word in COLORS]
    counts = [sum(color == asked for _, color in seen) for asked in colors]
    if kinds:
        return next(color for kind, color in seen if kind == kinds[0])
    if text.startswith("What shape"):
        return next(kind for kind, color in seen if color == colors[0])
    if text.startswith("Are more"):
        return "equal" if counts[0] == counts[1] else colors[int(counts[1] > counts[0])]
    return str(abs(counts[0] - counts[1]) if text.startswith("How far apart") else sum(counts))


@pytest.mark.parametrize("question", QUESTIONS[:120], ids=lambda question: question.id)
def test_gold_answers_agree_with_a_recount_of_the_pixels(question):
    prompt = question.prompt()
    seen = blobs(prompt.images[0])
    assert Counter(seen) == Counter((shape.kind, shape.color) for shape in question.shapes)
    assert prompt.gold.answer == recount(question.text, seen)


def test_a_question_is_a_function_of_split_seed_and_index():
    again = [make_question("train", 0, index) for index in range(30)]
    assert again == QUESTIONS[:30]
    assert again[7].prompt().images[0].tobytes() == QUESTIONS[7].prompt().images[0].tobytes()
    assert make_question("train", 1, 7) != QUESTIONS[7]


def test_splits_and_seeds_share_no_picture():
    splits = [("train", 0), ("train", 1), ("held_out", 0), ("warm_start", 0)]
    pictures = [paint(make_question(split, seed, i).shapes).tobytes() for split, seed in splits for i in range(600)]
    assert len(set(pictures)) == len(pictures)


def test_families_take_turns():
    assert Counter(question.family for question in QUESTIONS) == dict.fromkeys(
        FAMILIES, len(QUESTIONS) // len(FAMILIES)
    )


def test_careful_responses_are_right_and_in_the_format():
    for question in QUESTIONS:
        text = question.response.text
        assert is_well_formed(text)
        assert answer_content(text) == question.response.answer
        assert is_correct(text, question.prompt().gold)


def test_the_annotator_is_careless_as_often_as_it_says():
    rng = random.Random(0)
    texts = [annotate(question, rng) for question in QUESTIONS for _ in range(10)]
    malformed = sum(not is_well_formed(text) for text in texts) / len(texts)
    assert malformed == pytest.approx(MALFORMED_SHARE, abs=0.02)
    golds = [question.prompt().gold for question in QUESTIONS for _ in range(10)]
    right = sum(is_correct(text, gold) for text, gold in zip(texts, golds, strict=True)) / len(texts)
    assert 0.4 < right < 0.8


def test_the_annotator_never_errs_about_large_shapes():
    for question in QUESTIONS:
        if all(shape.size == "large" for shape in question.shapes):
            assert all(is_correct(annotate(question, random.Random(i)), question.prompt().gold) for i in range(5))


def test_pictures_have_the_size_of_sixteen_visual_tokens():
    assert paint(QUESTIONS[0].shapes).size == (IMAGE_SIDE, IMAGE_SIDE)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="-1 is negative"):
        make_question("train", 0, -1)
    with pytest.raises(ValueError, match="17 shapes do not fit"):
        place([("circle", "red", "large")] * 17, random.Random(0))
