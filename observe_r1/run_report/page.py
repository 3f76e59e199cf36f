"""The page of a run: what is shown where. The form is in report.html, report.css and report.js."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import pairwise
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from observe_r1.html_page import frame
from observe_r1.readable import duration
from observe_r1.run_report.benchmarks import read_benchmarks
from observe_r1.run_report.charts import Chart, line_chart, number, stacked_chart
from observe_r1.run_report.completions import read_completions, spread
from observe_r1.run_report.config import compare
from observe_r1.run_report.pictures import Pictures
from observe_r1.run_report.run import Run, steps_done
from observe_r1.run_report.scalars import Series
from observe_r1.run_report.tagged_text import tagged_parts

LEARNING: dict[str, dict[str, str]] = {  # title: names of curves by the names of the figures
    "Pass rate": {"val/pass_rate": "held-out, greedy", "rollout/pass_rate": "training, sampled"},
    "Reward": {"rollout/reward": "mean reward"},
    "Format of held-out answers": {"val/format_rate": "well formed"},
    "Length in tokens": {"rollout/length": "training", "val/length": "held-out"},
}
POLICY: dict[str, dict[str, str]] = {
    "KL to the reference": {"train/kl": "k3 estimate"},
    "Entropy": {"train/entropy": "mean over tokens"},
    "Clip fraction": {"train/clip_fraction": "share of tokens"},
    "Gradient norm": {"train/gradient_norm": "before clipping"},
    "Loss": {"train/loss": "loss"},
    "Distance of log-probs": {
        "train/log_ratio": "from the sampling policy",
        "train/sampler_mismatch": "sampler from trainer",
    },
}
WASTE: dict[str, dict[str, str]] = {
    "Wasted groups": {"rollout/wasted_groups": "without any advantage, share"},
    "Cut and left out": {"rollout/truncated": "cut by the length limit", "rollout/left_out": "not trained on"},
    "Refilled groups": {"rollout/refilled_groups": "dropped and drawn anew"},
    "Dynamic weight": {"rollout/dynamic_weight": "mean weight of a group"},
}
SPEED: dict[str, dict[str, str]] = {
    "Tokens per second": {
        "speed/generated_tokens_per_second": "generated",
        "speed/trained_tokens_per_second": "trained",
    },
    "Age of the sampling weights": {"rollout/steps_behind": "optimizer steps"},
}
LEVELS, HELD_OUT_LEVELS, PHASES, PARTS = "pass_rate_by_level/", "val/pass_rate_by_level/", "seconds/", "reward/"
MOST_COLUMNS = 13  # of the table of levels
MOST_OTHER = 40  # curves that are none of the above
OPEN_QUESTIONS = 5  # that are followed; the others unfold
WIDE_PICTURE = 1200  # pixels


@dataclass(frozen=True)
class LevelTable:
    """Pass rates by level, from easy to hard, and by step; None where there is none."""

    title: str
    steps: list[str]
    rows: list[tuple[str, list[float | None]]]
    note: str


def page(run: Run, now: float | None = None) -> str:
    """The HTML text. `now`: seconds since the epoch, for how long ago the run wrote something."""
    series = run.scalars.series
    completions = read_completions(run.directories, run.scalars.resumed)
    missing = list(run.missing)
    benchmarks = read_benchmarks(run.directories, missing)
    charts = Charts(series, run.scalars.resumed)
    sections = {
        "learning": charts.named(LEARNING) + charts.parts("Parts of the reward", PARTS),
        "policy": charts.named(POLICY) + charts.parts("Learning rate", "lr-"),
        "waste": charts.named(WASTE) + charts.stacked("Verdicts of a rollout", "verification/"),
        "speed": charts.stacked("Seconds per rollout, by phase", PHASES) + charts.named(SPEED),
    }
    levels = [
        table
        for table in (
            _levels(series, HELD_OUT_LEVELS, "Held-out questions"),
            _levels(series, LEVELS, "Training questions, as they came"),
        )
        if table is not None
    ]
    shown = charts.shown | {name for name in series if name.startswith((LEVELS, HELD_OUT_LEVELS))}
    benchmark_figures = tuple(f"{name}/" for name in benchmarks)
    others = [name for name in charts.series if not name.startswith(benchmark_figures) and name not in shown]
    missing += [f"{name} never was a number." for name in series if name not in charts.series]
    pictures = Pictures()
    if not (completions.rollouts or completions.followed):
        missing.append("Completions: there are none; the callbacks RewardLogger and HeldOutAnswers save them.")
    elif not completions.followed:
        missing.append("The same held-out questions over the training: the callback HeldOutAnswers saves them.")
    if completions.unreadable:
        missing.append(f"Completions: {completions.unreadable} lines could not be read.")
    body = _environment().get_template("report.html").render(
        run=run,
        title=_title(run),
        summary=run.summary,
        status=_status(run, time.time() if now is None else now),
        headline=_headline(run),
        health=[item for item in run.summary.get("health") or () if isinstance(item, dict)],
        has_health="health" in run.summary,
        sections=sections,
        levels=levels,
        others=[charts.one(name) for name in others[:MOST_OTHER]],
        others_left_out=len(others[MOST_OTHER:]),
        always_zero=charts.always_zero,
        gets_harder=run.option("data", "init_args", "order") == "ladder",
        completions=completions,
        pictures=pictures,
        benchmarks=benchmarks,
        shares=_shares(run.summary.get("seconds")),
        comparison=compare(run.config),
        config_text=run.config_text,
        missing=missing,
        open_questions=OPEN_QUESTIONS,
        wide=WIDE_PICTURE,
    )  # fmt: skip
    style, script = (
        files(__package__).joinpath(f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js")
    )
    return frame(_title(run), body, style, script)


class Charts:
    """Draws figures and remembers which ones."""

    def __init__(self, series: Mapping[str, Series], resumed: Sequence[int]) -> None:
        self.series = {name: values for name, values in series.items() if len(values.steps)}
        self.resumed = resumed
        self.shown: set[str] = set()
        self.always_zero: list[str] = []  # titles of charts that would show nothing

    def named(self, wanted: Mapping[str, Mapping[str, str]]) -> list[Chart]:
        charts = []
        for title, names in wanted.items():
            charts += self._chart(title, {said: name for name, said in names.items()})
        return charts

    def parts(self, title: str, prefix: str) -> list[Chart]:
        return self._chart(title, self._with(prefix))

    def stacked(self, title: str, prefix: str) -> list[Chart]:
        names = self._with(prefix)
        self.shown |= {*names.values()}
        # what takes most at the bottom, where it has no steps under it
        ordered = sorted(names.items(), key=lambda pair: -float(self.series[pair[1]].values.sum()))
        curves = {said: self.series[name] for said, name in ordered}
        return [stacked_chart(title, curves, self.resumed)] if curves else []

    def one(self, name: str) -> Chart:
        return line_chart(name, {name: self.series[name]}, self.resumed)

    def _with(self, prefix: str) -> dict[str, str]:
        return {name.removeprefix(prefix): name for name in self.series if name.startswith(prefix)}

    def _chart(self, title: str, names: Mapping[str, str]) -> list[Chart]:
        self.shown |= {*names.values()}
        curves = {said: self.series[name] for said, name in names.items() if name in self.series}
        if curves and not any(series.values.any() for series in curves.values()):
            self.always_zero += [f"{title} ({said})" for said in curves]
            return []
        return [line_chart(title, curves, self.resumed, floor=0.0)] if curves else []


@cache
def _environment() -> Environment:
    """Escapes all that is not marked as HTML, so what models and users wrote is shown and never run."""
    environment = Environment(
        loader=PackageLoader("observe_r1.run_report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "signed": _signed, "duration": duration, "tagged": tagged_parts}
    return environment


def _signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}"  # no minus before a zero


def _title(run: Run) -> str:
    resolved = run.directory.resolve()
    return f"{resolved.parent.name}/{resolved.name}"


def _status(run: Run, now: float) -> tuple[str, str]:
    """A class for the colour, and words."""
    status = run.summary.get("status")
    if status == "finished":
        return "good", "finished"
    if status is not None:
        return "bad", f"ended by {status}"
    written = run.scalars.last_written
    if written is None:
        return "open", "no summary and no figures"
    return "open", f"no summary: goes on, or was ended from outside. Last figures {duration(now - written)} ago"


def _headline(run: Run) -> list[tuple[str, str]]:
    rates, seconds = run.summary.get("pass_rate") or {}, run.summary.get("seconds") or {}
    held_out = run.scalars.series.get("val/pass_rate")
    before, after = rates.get("before"), rates.get("after")
    so_far = ""
    if after is None and held_out is not None and len(held_out.values):
        before = float(held_out.values[0]) if before is None and held_out.steps[0] == 0 else before
        if held_out.steps[-1] > 0:
            after, so_far = float(held_out.values[-1]), f", at step {held_out.steps[-1]}"
    steps = steps_done(run)
    versions = run.summary.get("versions") or {}
    said = [
        ("Held-out pass rate", _change(before, after, so_far) if (before, after) != (None, None) else None),
        ("Optimizer steps", None if steps is None else f"{steps:,}"),
        ("Time", duration(seconds["total"]) if "total" in seconds else None),
        ("Model", run.option("model", "policy", "pretrained")),
        ("Ladder", run.option("data", "init_args", "ladder") or run.option("data", "init_args", "directory")),
        ("Strategy", run.option("trainer", "strategy")),
        ("Seed", run.summary.get("seed", run.option("seed_everything"))),
        ("Device", versions.get("device")),
    ]
    return [(name, _plain(value)) for name, value in said if value is not None]


def _plain(value: Any) -> str:
    return str(value.get("class_path", value)) if isinstance(value, dict) else str(value)


def _change(before: float | None, after: float | None, so_far: str) -> str:
    if before is None or after is None:
        return f"{'unknown' if before is None else f'{before:.1%}'} → {'unknown' if after is None else f'{after:.1%}'}"
    return f"{before:.1%} → {after:.1%} ({100 * (after - before):+.1f} points{so_far})"


def _levels(series: Mapping[str, Series], prefix: str, title: str) -> LevelTable | None:
    found = {name.removeprefix(prefix): values for name, values in series.items() if name.startswith(prefix)}
    steps = sorted({int(step) for values in found.values() for step in values.steps})
    if not steps:
        return None
    if len(steps) <= MOST_COLUMNS or prefix == HELD_OUT_LEVELS:
        columns = [[step] for step in spread(steps, MOST_COLUMNS)]
        note = f"{len(columns)} of {len(steps)} validations are shown." if len(columns) < len(steps) else ""
    else:
        cuts = [round(place * len(steps) / (MOST_COLUMNS - 1)) for place in range(MOST_COLUMNS)]
        columns = [steps[start:end] for start, end in pairwise(cuts)]
        note = "A column is the mean over the steps that it names."
    names = [f"{column[0]}" if len(column) == 1 else f"{column[0]}–{column[-1]}" for column in columns]
    rows = [(level, [_mean(found[level], column) for column in columns]) for level in sorted(found)]
    return LevelTable(title, names, rows, note)


def _mean(values: Series, steps: Sequence[int]) -> float | None:
    chosen = values.values[(values.steps >= steps[0]) & (values.steps <= steps[-1])]
    return float(chosen.mean()) if len(chosen) else None


def _shares(seconds: Any) -> list[tuple[str, float, float]]:
    """Phases with their seconds and their share of the whole, the longest first."""
    if not isinstance(seconds, dict) or not seconds.get("total"):
        return []
    total = float(seconds["total"])
    phases: Iterable[tuple[str, float]] = ((name, float(spent)) for name, spent in seconds.items() if name != "total")
    ordered = sorted(phases, key=lambda pair: -pair[1])
    rest = total - sum(spent for _, spent in ordered)
    return [(name, spent, spent / total) for name, spent in [*ordered, *([("other", rest)] if rest > 0 else [])]]
