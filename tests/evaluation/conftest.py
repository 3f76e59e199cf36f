"""Small data sets in the published schemas, with questions that the tiny policy can answer."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from observe_r1.quickstart.questions import Question, make_question
from observe_r1.quickstart.scenes import COLORS, KINDS, paint

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
MATHVISTA = pa.schema(
    [
        ("pid", pa.string()),
        ("question", pa.string()),
        ("image", pa.string()),
        ("decoded_image", IMAGE),
        ("choices", pa.list_(pa.string())),
        ("unit", pa.string()),
        ("precision", pa.float64()),  # the published file holds floats
        ("answer", pa.string()),
        ("question_type", pa.string()),
        ("answer_type", pa.string()),
        (
            "metadata",
            pa.struct(
                [
                    *((name, pa.string()) for name in ("category", "context", "grade", "language", "source", "split")),
                    *((name, pa.int64()) for name in ("img_height", "img_width")),
                    ("skills", pa.list_(pa.string())),
                    ("task", pa.string()),
                ]
            ),
        ),
        ("query", pa.string()),
    ]
)
MMMU = pa.schema(
    [
        *((name, pa.string()) for name in ("id", "question", "options", "explanation")),
        *((f"image_{number}", IMAGE) for number in range(1, 8)),
        *((name, pa.string()) for name in ("img_type", "answer", "topic_difficulty", "question_type", "subfield")),
    ]
)
SUBJECTS = ("Art", "Math", "Music")


def stored(picture: Image.Image) -> dict[str, Any]:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": "picture.png"}


def question_at(number: int) -> tuple[Question, list[str]]:
    """A question of the quick start and its options; none where the answer is a number."""
    question = make_question("held_out", 9, number)
    answer = question.response.answer
    options = list(COLORS if answer in COLORS else KINDS if answer in KINDS else [])
    if answer == "equal":
        options = [*question.about, "equal"]
    return question, options


def mathvista_row(number: int) -> dict[str, Any]:
    question, options = question_at(number)
    return {
        "pid": str(number + 1),
        "question": question.text,
        "image": f"images/{number + 1}.jpg",
        "decoded_image": stored(paint(question.shapes)),
        "choices": options or None,
        "unit": None,
        "precision": None,
        "answer": question.response.answer,
        "question_type": "multi_choice" if options else "free_form",
        "answer_type": "text" if options else "integer",
        "metadata": {
            "category": "general-vqa",
            "context": "synthetic scene",
            "grade": "daily life",
            "language": "english",
            "source": "quickstart",
            "split": "testmini",
            "img_height": 112,
            "img_width": 112,
            "skills": ["numeric commonsense", "arithmetic reasoning"][: 1 + number % 2],
            "task": question.family,
        },
        "query": question.text,
    }


def mmmu_row(number: int, subject: str, index: int) -> dict[str, Any]:
    question, options = question_at(number)
    picture = stored(paint(question.shapes))
    images = {f"image_{place}": None for place in range(1, 8)} | {"image_1": picture}
    texts = list(options)
    if options and number % 4 == 0:  # an option that is a picture
        images["image_2"], texts[-1] = picture, "<image 2>"
    letters = "ABCDEFGHIJ"
    answer = question.response.answer
    return {
        "id": f"validation_{subject}_{index}",
        "question": f"<image 1> {question.text}",
        "options": str(texts),
        "explanation": "",
        **images,
        "img_type": "['Paintings']",
        "answer": letters[options.index(answer)] if options else str([answer, "many"]) if number % 5 == 3 else answer,
        "topic_difficulty": ("Easy", "Medium", "Hard")[number % 3],
        "question_type": "multiple-choice" if options else "open",
        "subfield": "Shapes",
    }


def write(path: Path, rows: Sequence[dict[str, Any]], schema: pa.Schema, rows_per_group: int = 5) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path, row_group_size=rows_per_group)
    return path


@pytest.fixture(scope="session")
def mathvista_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 questions as the hub lays them out: `data/testmini-…`, beside a split without answers."""
    directory = tmp_path_factory.mktemp("mathvista")
    rows = [mathvista_row(number) for number in range(23)]
    write(directory / "data/testmini-00000-of-00001-725687bf7a18d64b.parquet", rows, MATHVISTA)
    hidden = [{**row, "answer": ""} for row in rows[:3]]
    write(directory / "data/test-00000-of-00002-6b81bd7f7e2065e6.parquet", hidden, MATHVISTA)
    return directory


@pytest.fixture(scope="session")
def mmmu_rows() -> dict[str, list[dict[str, Any]]]:
    """By subject, seven questions each."""
    return {
        subject: [mmmu_row(7 * place + index, subject, index + 1) for index in range(7)]
        for place, subject in enumerate(SUBJECTS)
    }


@pytest.fixture(scope="session")
def mmmu_directory(tmp_path_factory: pytest.TempPathFactory, mmmu_rows: dict[str, list[dict[str, Any]]]) -> Path:
    """One folder per subject, as the official data set."""
    directory = tmp_path_factory.mktemp("mmmu")
    for subject, rows in mmmu_rows.items():
        write(directory / subject / "validation-00000-of-00001.parquet", rows, MMMU)
        write(directory / subject / "dev-00000-of-00001.parquet", rows[:1], MMMU)
    return directory


@pytest.fixture(scope="session")
def merged_mmmu(tmp_path_factory: pytest.TempPathFactory, mmmu_rows: dict[str, list[dict[str, Any]]]) -> Path:
    """All subjects in one file, as the merged data set."""
    rows = [row for rows in mmmu_rows.values() for row in rows]
    return write(tmp_path_factory.mktemp("merged") / "data/validation-00000-of-00001.parquet", rows, MMMU)
