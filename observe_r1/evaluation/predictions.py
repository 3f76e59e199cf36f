"""Saved predictions: JSON Lines that hold all that is needed to score them again, or to go on after an interruption."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from observe_r1.evaluation.item import Item, Judgement, Outcome, Verdict

if TYPE_CHECKING:
    from observe_r1.evaluation.benchmark import Benchmark

FORMAT = "observe_r1.predictions.1"
SAVED_CANDIDATES = 50  # of an open answer; hostile responses have hundreds of thousands


@dataclass(frozen=True)
class Prediction:
    """A response to a question of a benchmark, and what it is worth.

    Args:
        item: The question.
        position: Among all questions of the benchmark.
        prompt_hash: Of the token ids and pixels that the model read; empty where the question could not be asked.
        response: As the model gave it.
        tokens: Length of the response.
        truncated: Stopped by the length limit.
        well_formed: Has the form that the format reward asks for.
        verdict: What it is worth.
        refused: Why the question could not be asked, which counts as a wrong answer; None where it was asked.
    """

    item: Item
    position: int
    prompt_hash: str
    response: str
    tokens: int
    truncated: bool
    well_formed: bool
    verdict: Verdict
    refused: str | None = None

    def judged_again(self, benchmark: Benchmark) -> Prediction:
        """With the verdict of the benchmark as it is now; a question that could not be asked stays wrong."""
        if self.refused is not None:
            return self
        return dataclasses.replace(self, verdict=benchmark.judge(self.item, self.response))

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.item.id,
            "position": self.position,
            "prompt_hash": self.prompt_hash,
            "response": self.response,
            "tokens": self.tokens,
            "truncated": self.truncated,
            "well_formed": self.well_formed,
            "refused": self.refused,
            "extraction": self.verdict.extraction,
            "strict": _judgement_to_json(self.verdict.strict),
            "lenient": _judgement_to_json(self.verdict.lenient),
            "item": self.item.to_json(),
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Prediction:
        judgements = [_judgement_from_json(row[name]) for name in ("strict", "lenient")]
        taken = ("position", "prompt_hash", "response", "tokens", "truncated", "well_formed", "refused")
        return cls(
            item=Item.from_json(row["item"]),
            verdict=Verdict(row["extraction"], *judgements),
            **{name: row[name] for name in taken},
        )


def _judgement_to_json(judgement: Judgement) -> dict[str, Any]:
    prediction = judgement.prediction
    kept = prediction[:SAVED_CANDIDATES] if isinstance(prediction, list) else prediction
    return {"outcome": judgement.outcome.name.lower(), "prediction": kept}


def _judgement_from_json(values: Mapping[str, Any]) -> Judgement:
    return Judgement(Outcome[values["outcome"].upper()], values["prediction"])


@dataclass(frozen=True)
class Header:
    """The first line of a file: what its predictions belong to. Files with equal headers can be joined.

    Args:
        benchmark: Its class, by module and name.
        name: Of the benchmark in figures.
        questions: Number of the questions that are asked.
        asked: How they are asked and who answers: checksum of the weights, sampling, prompt options.
    """

    benchmark: str
    name: str
    questions: int
    asked: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **dataclasses.asdict(self)}


def write_predictions(path: Path, header: Header, predictions: Iterable[Prediction]) -> None:
    """Writes a file that appears under its name only when it is complete."""
    partial = path.with_name(path.name + ".unfinished")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(map(_line, (header.to_json(), *(prediction.to_json() for prediction in predictions))))
    partial.replace(path)


class PredictionLog:
    """Appends predictions to a file as they come. What an interruption leaves of a last line is passed over later."""

    def __init__(self, path: Path, header: Header, known: Iterable[Prediction] = ()) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        write_predictions(path, header, known)

    def append(self, predictions: Iterable[Prediction]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(_line(prediction.to_json()) for prediction in predictions)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row) + "\n"  # ASCII only: a response may hold what UTF-8 cannot


def read_predictions(path: Path) -> tuple[Header, list[Prediction]]:
    """What a file holds; a torn last line is left out.

    Raises:
        ValueError: There is no such file, or it was not written by this module.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    rows = []
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines) - 1:
                raise ValueError(f"{path}, line {number + 1} is not JSON: {error}") from error
    if not rows or not isinstance(rows[0], dict) or rows[0].pop("format", None) != FORMAT:
        raise ValueError(
            f"{path} does not begin with a line of format {FORMAT!r}: BenchmarkEvaluation writes such files"
        )
    try:
        return Header(**rows[0]), [Prediction.from_json(row) for row in rows[1:]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not as BenchmarkEvaluation writes it: {error!r}") from error


def answered_before(path: Path, header: Header, items: Sequence[Item]) -> dict[int, Prediction]:
    """By position, what an earlier run with the same header has answered: from the file, or from what it left of it."""
    found: dict[int, Prediction] = {}
    for candidate in (path, *sorted(path.parent.glob(f"{path.stem}.rank*.partial"))):
        if not candidate.is_file():
            continue
        try:
            other, predictions = read_predictions(candidate)
        except ValueError:  # something else, or killed before the first line was written
            continue
        if other == header:
            found |= {p.position: p for p in predictions if p.position < len(items) and items[p.position] == p.item}
    return found


def partial_path(path: Path, rank: int) -> Path:
    """Where a rank logs its predictions until all ranks have finished."""
    return path.with_name(f"{path.stem}.rank{rank}.partial")
