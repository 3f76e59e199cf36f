"""MMMU (arXiv 2311.16502): 900 questions of the split `validation`, from 30 subjects of university courses."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from observe_r1.evaluation.benchmark import extract
from observe_r1.evaluation.item import Item, Outcome, Verdict
from observe_r1.evaluation.mmmu_scoring import MULTIPLE_CHOICE, guesses, judge_leniently, judge_strictly, letters_of
from observe_r1.evaluation.parquet_benchmark import MAX_IMAGE_PIXELS, ParquetBenchmark

SUBJECTS = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": (
        "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy Public_Health"
    ),
    "Humanities and Social Science": "History Literature Sociology Psychology",
    "Tech and Engineering": (
        "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power Materials "
        "Mechanical_Engineering"
    ),
}
DOMAIN_OF = {subject: domain for domain, subjects in SUBJECTS.items() for subject in subjects.split()}

OFFICIAL = "official"
AFTER_OPTIONS = "Answer with the option's letter from the given choices directly."
AFTER_OPEN_QUESTION = "Answer the question using a single word or phrase."


class MMMU(ParquetBenchmark):
    """Reads the merged data set (lmms-lab/MMMU) and the 30 subjects of the official one (MMMU/MMMU) alike.

    `strict` is the official parser on the content of the last `<answer>` block, `lenient` unwraps the answer before.
    A response that names no option is wrong in both; `official` guesses there as the official script does, with its
    seed, and is reported beside them.

    Args:
        source: A parquet file, a directory or glob of such files, or a data set on the hub.
        split: `validation` or `dev`; the answers of `test` are not public.
        max_image_pixels: Larger pictures are refused before they are decoded.
    """

    name = "mmmu"
    columns = ("id", "question", "options", "answer", "question_type", "topic_difficulty")
    image_columns = tuple(f"image_{number}" for number in range(1, 8))

    def __init__(
        self, source: str = "lmms-lab/MMMU", split: str = "validation", max_image_pixels: int = MAX_IMAGE_PIXELS
    ) -> None:
        super().__init__(source, split, max_image_pixels)

    def item(self, row: Mapping[str, Any]) -> Item:
        item = item_of(row)
        if item.question_type == MULTIPLE_CHOICE and item.answer not in (*letters_of(item.choices), "?"):
            raise ValueError(f"answer {item.answer!r} of {item.id} is not the letter of one of {item.choices}")
        return item

    def text(self, row: Mapping[str, Any]) -> str:
        return prompt_text(self.item(row), row["question"])

    def judge(self, item: Item, response: str) -> Verdict:
        extraction = extract(response)
        return Verdict(extraction, judge_strictly(extraction, item), judge_leniently(extraction, item))

    def scorings(
        self, items: Sequence[Item], strict: Sequence[Outcome], lenient: Sequence[Outcome]
    ) -> dict[str, list[Outcome]]:
        order = sorted(range(len(items)), key=lambda number: items[number].groups["subject"])
        drawn = guesses([items[number] for number in order], [strict[number] for number in order])
        official = dict(zip(order, drawn, strict=True))
        scorings = super().scorings(items, strict, lenient)
        return {**scorings, OFFICIAL: [official[number] for number in range(len(items))]}


def item_of(row: Mapping[str, Any]) -> Item:
    """What scoring needs of a row.

    Raises:
        ValueError: The name of the question has no known subject.
    """
    subject = "_".join(row["id"].split("_")[1:-1])
    if subject not in DOMAIN_OF:
        raise ValueError(f"the subject in the id {row['id']!r} is not one of {', '.join(sorted(DOMAIN_OF))}")
    is_choice = row["question_type"] == MULTIPLE_CHOICE
    return Item(
        id=row["id"],
        answer=row["answer"] if is_choice else _one_or_several(row["answer"]),
        question_type=row["question_type"],
        choices=[str(option) for option in ast.literal_eval(row["options"])] if is_choice else [],
        groups={
            "domain": [DOMAIN_OF[subject]],
            "subject": [subject],
            "question_type": [row["question_type"]],
            "topic_difficulty": [row["topic_difficulty"]] if row["topic_difficulty"] else [],
        },
    )


def prompt_text(item: Item, question: str) -> str:
    """The official prompt; markers such as `<image 1>` stay in it."""
    if item.question_type != MULTIPLE_CHOICE:
        return f"{question}\n{AFTER_OPEN_QUESTION}"
    options = "".join(
        f"({letter}) {text}\n" for letter, text in zip(letters_of(item.choices), item.choices, strict=True)
    )
    return f"{question}\n{options}\n{AFTER_OPTIONS}"


def _one_or_several(answer: str) -> str | list[str]:
    """Three answers of the validation split are lists, written as text."""
    try:
        value = ast.literal_eval(answer) if answer.startswith("[") else answer
    except (ValueError, SyntaxError):
        return answer
    return [str(one) for one in value] if isinstance(value, list) else answer
