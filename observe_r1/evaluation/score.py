"""`observe-r1 score`: scores saved predictions again, without a model and without the data set."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from observe_r1.evaluation.benchmark import Benchmark
from observe_r1.evaluation.item import Outcome
from observe_r1.evaluation.predictions import Header, Prediction, read_predictions, write_predictions
from observe_r1.evaluation.report import Marks, Report, report

OWN_PACKAGE = "observe_r1.evaluation."


def score_predictions(
    predictions: Path,
    benchmark: Benchmark | None = None,
    output: Path | None = None,
    report_to: Path | None = None,
) -> Report:
    """Score saved predictions again and print the figures. Needs neither the model nor the data set.

    Args:
        predictions: JSON Lines that BenchmarkEvaluation wrote.
        benchmark: Judges by this one, given by class_path; its arguments follow as --benchmark.ARGUMENT VALUE. Default:
            the benchmark that the file names, if it is one of observe_r1; one of your own has to be given.
        output: Write the predictions with their new verdicts to this file.
        report_to: Write all figures to this JSON file.

    Raises:
        ValueError: The file is not of this format, holds no predictions, or names a benchmark that is not ours.
    """
    header, found = read_predictions(predictions)
    saved = sorted(found, key=lambda prediction: prediction.position)
    judging = benchmark or _named_benchmark(header, predictions)
    judged = [prediction.judged_again(judging) for prediction in saved]
    items = [prediction.item for prediction in judged]
    numbered = [replace(prediction, position=number) for number, prediction in enumerate(judged)]
    result = report(judging, items, Marks.of(numbered, len(items)))
    if output is not None:
        write_predictions(output, header, judged)
    if report_to is not None:
        report_to.write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
    console = Console()
    console.print(result.table())
    changed = sum(_outcomes(new) != _outcomes(old) for new, old in zip(judged, saved, strict=True))
    if changed:
        console.print(f"{changed} verdicts differ from the saved ones.")
    if len(saved) < header.questions:
        console.print(f"The file holds {len(saved)} of {header.questions} questions: its run did not finish.")
    return result


def _named_benchmark(header: Header, path: Path) -> Benchmark:
    # a file from elsewhere must not choose what is imported
    if not header.benchmark.startswith(OWN_PACKAGE):
        raise ValueError(
            f"{path} is of {header.benchmark}: give it as --benchmark {header.benchmark}, and what arguments it needs "
            "as --benchmark.ARGUMENT VALUE"
        )
    module, _, name = header.benchmark.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{path} is of {header.benchmark}, which this version does not have") from error
    if not (isinstance(found, type) and issubclass(found, Benchmark)):
        raise ValueError(f"{path} is of {header.benchmark}, which is no benchmark")
    return found()


def _outcomes(prediction: Prediction) -> tuple[Outcome, Outcome]:
    return prediction.verdict.strict.outcome, prediction.verdict.lenient.outcome
