"""MathVista (arXiv 2310.02255): 1,000 questions of mathematics in pictures, split `testmini` of AI4Math/MathVista."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from observe_r1.evaluation.benchmark import extract
from observe_r1.evaluation.item import Item, Verdict
from observe_r1.evaluation.mathvista_scoring import judge_leniently, judge_strictly
from observe_r1.evaluation.parquet_benchmark import MAX_IMAGE_PIXELS, ParquetBenchmark

ITEM_BREAKDOWNS = ("question_type", "answer_type")
METADATA_BREAKDOWNS = ("language", "source", "category", "task", "context", "grade", "skills")


class MathVista(ParquetBenchmark):
    """Questions are asked with the official prompt, which the data set carries in its column `query`.

    `strict` is the official function on the content of the last `<answer>` block; `lenient` unwraps the answer before
    (`B.`, `12 cm`, `1/2`). The official pipeline has a language model extract the answer; here the tags do.

    Args:
        source: A parquet file, a directory or glob of such files, or a data set on the hub.
        split: `testmini`; the answers of `test` are not public.
        max_image_pixels: Larger pictures are refused before they are decoded.
    """

    name = "mathvista"
    columns = ("pid", "query", "choices", "unit", "precision", "answer", "question_type", "answer_type", "metadata")
    image_columns = ("decoded_image",)

    def __init__(
        self, source: str = "AI4Math/MathVista", split: str = "testmini", max_image_pixels: int = MAX_IMAGE_PIXELS
    ) -> None:
        super().__init__(source, split, max_image_pixels)

    def item(self, row: Mapping[str, Any]) -> Item:
        return item_of(row)

    def text(self, row: Mapping[str, Any]) -> str:
        return str(row["query"])

    def judge(self, item: Item, response: str) -> Verdict:
        extraction = extract(response)
        return Verdict(extraction, judge_strictly(extraction, item), judge_leniently(extraction, item))


def item_of(problem: Mapping[str, Any]) -> Item:
    """What scoring needs of a problem, as the parquet files and the official JSON files hold it."""
    breakdowns = {name: problem[name] for name in ITEM_BREAKDOWNS}
    breakdowns |= {name: problem["metadata"][name] for name in METADATA_BREAKDOWNS}
    return Item(
        id=str(problem["pid"]),
        answer=problem["answer"],
        question_type=problem["question_type"],
        answer_type=problem["answer_type"],
        choices=list(problem["choices"] or []),
        precision=problem["precision"],
        unit=problem["unit"] or None,
        groups={name: value if isinstance(value, list) else [value] for name, value in breakdowns.items()},
    )
