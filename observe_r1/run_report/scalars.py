"""The figures of a run over its steps, from TensorBoard's event files or the table of CSVLogger."""

from __future__ import annotations

import csv
import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

EVENT_FILES = "events.out.tfevents.*"
TABLE = "metrics.csv"
AXES = ("epoch", "step", "hp_metric")  # columns that are no figures

Points = dict[int, float]  # value by step


@dataclass(frozen=True)
class Series:
    """One figure; steps rise, values are finite."""

    steps: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]
    not_finite: int = 0  # points that were left out, because they are no numbers


@dataclass
class Scalars:
    """All figures of a run by name, and what is to be known about them."""

    series: dict[str, Series] = field(default_factory=dict)
    resumed: list[int] = field(default_factory=list)  # steps from which a later part of the run counts
    last_written: float | None = None  # seconds since the epoch
    problems: list[str] = field(default_factory=list)


def read_scalars(directories: Sequence[Path]) -> Scalars:
    """The figures of the parts of one run, in the order in which they were trained.

    Where steps overlap, as after a resume from a checkpoint, those of the later part count.
    """
    found = Scalars()
    merged: dict[str, Points] = defaultdict(dict)
    for source, points in _sources(directories, found):
        if not points:
            continue
        found.last_written = max(source.stat().st_mtime, found.last_written or 0.0)
        first = min(min(values) for values in points.values())
        if merged and all(name.startswith("val/") for name in points):
            continue  # a later `validate` in the same directory
        if merged:
            found.resumed.append(first)
            for earlier in merged.values():
                for step in [step for step in earlier if step >= first]:
                    del earlier[step]
        for name, values in points.items():
            merged[name].update(values)
    found.series = {name: _series(values) for name, values in merged.items() if values}
    return found


def _series(points: Points) -> Series:
    finite = sorted((step, value) for step, value in points.items() if math.isfinite(value))
    steps, values = ([pair[0] for pair in finite], [pair[1] for pair in finite])
    return Series(np.array(steps, np.int64), np.array(values, np.float64), len(points) - len(finite))


def _sources(directories: Sequence[Path], found: Scalars) -> Iterator[tuple[Path, dict[str, Points]]]:
    for directory in directories:
        files = sorted(directory.glob(EVENT_FILES), key=lambda path: (_started(path), path.name))
        table = directory / TABLE
        for path in files or [table] * table.is_file():
            try:
                yield path, _table(path) if path == table else _events(path)
            except Exception as error:  # what damaged files raise is not documented, and the rest can be shown
                found.problems.append(f"{path.name} could not be read ({type(error).__name__}: {error}).")


def _started(path: Path) -> int:
    """The second in which an event file was begun, from its name."""
    second = path.name.removeprefix(EVENT_FILES.rstrip("*")).partition(".")[0]
    return int(second) if second.isdigit() else 0


def _events(path: Path) -> dict[str, Points]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of the last record of a run that goes on
    one = dict.fromkeys(("compressedHistograms", "images", "audio", "histograms", "tensors"), 1)
    events = EventAccumulator(str(path), size_guidance={"scalars": 0, **one}).Reload()
    names = (name for name in events.Tags()["scalars"] if name not in AXES)
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in names}


def _table(path: Path) -> dict[str, Points]:
    points: dict[str, Points] = defaultdict(dict)
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            step = row.get("step")
            if not step or not step.isdigit():  # the end of a run that was cut off
                continue
            for name, value in row.items():
                if value and name and name not in AXES:
                    try:
                        points[name][int(step)] = float(value)
                    except ValueError:
                        continue
    return points
