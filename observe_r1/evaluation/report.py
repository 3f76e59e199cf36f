"""What is reported of the answers to a benchmark: pure functions of the marks, for logs, files and the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from observe_r1.evaluation.benchmark import Benchmark
from observe_r1.evaluation.item import Item, Outcome
from observe_r1.evaluation.predictions import Prediction
from observe_r1.evaluation.tally import Breakdowns, Tally, break_down, tally

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Marks:
    """One integer per question of a benchmark and figure; 0 for questions that were not answered."""

    strict: list[int]  # an Outcome
    lenient: list[int]  # an Outcome
    tokens: list[int]  # of the response
    well_formed: list[int]  # 0 or 1
    truncated: list[int]  # 0 or 1
    refused: list[int]  # 0 or 1: could not be asked

    @classmethod
    def of(cls, predictions: Sequence[Prediction], questions: int) -> Marks:
        columns = {column.name: [0] * questions for column in fields(cls)}
        for prediction in predictions:
            for name, value in marks_of(prediction).items():
                columns[name][prediction.position] = value
        return cls(**columns)


def marks_of(prediction: Prediction) -> dict[str, int]:
    """The marks of one answer."""
    return {
        "strict": int(prediction.verdict.strict.outcome),
        "lenient": int(prediction.verdict.lenient.outcome),
        "tokens": prediction.tokens,
        "well_formed": int(prediction.well_formed),
        "truncated": int(prediction.truncated),
        "refused": int(prediction.refused is not None),
    }


@dataclass(frozen=True)
class Report:
    """The figures of a benchmark.

    Args:
        name: Of the benchmark.
        overall: By way of scoring; the first is the one that `accuracy` means.
        breakdowns: By way of scoring.
        questions: That were to be answered.
        refused: Of these, could not be asked and count as wrong.
        length: Mean tokens of a response.
        format_rate: Share of the responses with the form of the format reward.
        truncation_rate: Share of the responses that the length limit stopped.
    """

    name: str
    overall: dict[str, Tally]
    breakdowns: dict[str, Breakdowns]
    questions: int
    refused: int
    length: float
    format_rate: float
    truncation_rate: float

    def figures(self) -> dict[str, float]:
        """By name, for loggers. Breakdowns are those of the first way of scoring."""
        first = next(iter(self.overall))
        low, high = self.overall[first].interval
        figures = {"accuracy": self.overall[first].accuracy, "accuracy_low": low, "accuracy_high": high}
        figures |= {f"accuracy_{scoring}": tallied.accuracy for scoring, tallied in self.overall.items()}
        figures |= {
            "length": self.length,
            "format_rate": self.format_rate,
            "truncation_rate": self.truncation_rate,
            "questions": float(self.questions),
            "refused": float(self.refused),
        }
        for group, by_value in self.breakdowns[first].items():
            figures |= {f"by_{group}/{value.replace(' ', '_')}": t.accuracy for value, t in by_value.items()}
        return {f"{self.name}/{name}": value for name, value in figures.items()}

    def to_json(self) -> dict[str, Any]:
        return {
            "benchmark": self.name,
            "questions": self.questions,
            "refused": self.refused,
            "length": self.length,
            "format_rate": self.format_rate,
            "truncation_rate": self.truncation_rate,
            "scores": {
                scoring: {
                    "overall": tallied.to_json(),
                    **{
                        group: {value: t.to_json() for value, t in by_value.items()}
                        for group, by_value in self.breakdowns[scoring].items()
                    },
                }
                for scoring, tallied in self.overall.items()
            },
        }

    def headline(self) -> str:
        """Every accuracy with its 95 % interval."""
        return ", ".join(
            "{} {:.1%} [{:.1%}, {:.1%}]".format(scoring, t.accuracy, *t.interval) for scoring, t in self.overall.items()
        )

    def line(self) -> str:
        """The most important figures in one line."""
        refused = f", {self.refused} could not be asked" if self.refused else ""
        return (
            f"{self.name}: {self.headline()} of {self.questions} questions; {self.length:.0f} tokens, format "
            f"{self.format_rate:.1%}, truncated {self.truncation_rate:.1%}{refused}"
        )

    def table(self) -> RenderableType:
        """All figures for the terminal, with 95 % intervals."""
        from rich.box import SIMPLE
        from rich.markup import escape
        from rich.table import Table

        # three ways of scoring within 80 columns; where it is narrower, names are broken and figures are not
        table = Table(title=self.line(), title_justify="left", title_style="bold", box=SIMPLE, padding=0)
        table.add_column("", overflow="fold")
        for scoring in self.overall:
            table.add_column(scoring, justify="right", no_wrap=True)
            table.add_column("95 %", justify="right", style="dim", no_wrap=True)
        table.add_column(" right / all", justify="right", no_wrap=True)

        def add(name: str, tallies: Sequence[Tally]) -> None:
            cells = [cell for t in tallies for cell in (f"{t.accuracy:.1%}", "{:.0%}-{:.0%}".format(*t.interval))]
            table.add_row(name, *cells, f"{tallies[0].correct} / {tallies[0].total}")

        add("overall", list(self.overall.values()))
        for group, by_value in next(iter(self.breakdowns.values())).items():
            table.add_section()
            table.add_row(f"[bold]{escape(group)}")
            for value in by_value:
                add(f"  {escape(value)}", [self.breakdowns[scoring][group][value] for scoring in self.overall])
        return table


def report(benchmark: Benchmark, items: Sequence[Item], marks: Marks) -> Report:
    """The figures of the questions that were answered.

    Raises:
        ValueError: None was.
    """
    strict, lenient = ([Outcome(mark) for mark in column] for column in (marks.strict, marks.lenient))
    scorings = benchmark.scorings(items, strict, lenient)
    overall = {scoring: counted for scoring, outcomes in scorings.items() if (counted := tally(outcomes)) is not None}
    if not overall:
        raise ValueError(f"{benchmark.name}: no question was answered, so there is nothing to report")
    questions, refused = next(iter(overall.values())).total, sum(marks.refused)
    asked = max(questions - refused, 1)
    return Report(
        name=benchmark.name,
        overall=overall,
        breakdowns={scoring: break_down(items, outcomes) for scoring, outcomes in scorings.items()},
        questions=questions,
        refused=refused,
        length=sum(marks.tokens) / asked,
        format_rate=sum(marks.well_formed) / asked,
        truncation_rate=sum(marks.truncated) / asked,
    )
