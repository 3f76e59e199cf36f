"""What `BenchmarkEvaluation` left in the directory of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: accuracy with its 95 % interval by way of scoring, and the picture of examples."""

    name: str  # of the file, such as step-000100
    scores: dict[str, tuple[float, float, float]]
    questions: int
    refused: int
    format_rate: float
    length: float
    picture: Path | None

    @property
    def when(self) -> str:
        digits = self.name.removeprefix("step-")
        return f"step {int(digits)}" if digits.isdigit() else self.name


def read_benchmarks(directories: Sequence[Path], missing: list[str]) -> dict[str, list[Evaluation]]:
    """By benchmark, in the order of the steps; a later part of the run replaces an earlier one."""
    found: dict[str, dict[str, Evaluation]] = {}
    for directory in directories:
        for path in sorted((directory / "evaluation").glob("*/*.json")):
            try:
                evaluation = _read(path)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                missing.append(f"Benchmark: {path.parent.name}/{path.name} could not be read ({error!r}).")
                continue
            found.setdefault(path.parent.name, {})[path.stem] = evaluation
    return {name: [by_name[stem] for stem in sorted(by_name)] for name, by_name in found.items()}


def _read(path: Path) -> Evaluation:
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    picture = path.with_suffix(".png")
    return Evaluation(
        name=path.stem,
        scores={
            scoring: (score["overall"]["accuracy"], score["overall"]["low"], score["overall"]["high"])
            for scoring, score in report["scores"].items()
        },
        questions=int(report["questions"]),
        refused=int(report["refused"]),
        format_rate=float(report["format_rate"]),
        length=float(report["length"]),
        picture=picture if picture.is_file() else None,
    )
