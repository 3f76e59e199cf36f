"""Curves as SVG that takes its colours from the page, and the same numbers for the script that shows them.

matplotlib's SVG has fixed colours and outlined text; of it we take where ticks go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from observe_r1.run_report.scalars import Series

WIDTH, HEIGHT = 420, 190
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 8, 24  # margins
MOST_POINTS = 300  # of a curve; beyond it, points are means of several steps
COLOURS = 8  # that the style sheet has

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Chart:
    """What the page shows of one or several curves."""

    title: str
    svg: Markup
    names: list[str]  # of the curves, in the order of their colours
    data: dict[str, Any]  # for the script
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Thinned:
    """A curve of bounded length: means of `every` neighbouring points, with their range where that is more than one."""

    steps: Array
    values: Array
    low: Array
    high: Array
    every: int


def thin(series: Series, most: int = MOST_POINTS) -> Thinned:
    """At most this many points, in the order of the steps."""
    steps, values = series.steps.astype(np.float64), series.values
    every = max(1, -(-len(steps) // most))
    starts = np.arange(0, len(steps), every)
    counts = np.diff([*starts, len(steps)])
    return Thinned(
        np.add.reduceat(steps, starts) / counts,
        np.add.reduceat(values, starts) / counts,
        np.minimum.reduceat(values, starts),
        np.maximum.reduceat(values, starts),
        every,
    )


def number(value: float) -> str:
    """Short, with three or four significant digits."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.3g}{letter}"
    return f"{value:.4g}" if abs(value) >= 1000 else f"{value:.3g}"


def line_chart(
    title: str, curves: Mapping[str, Series], resumed: Sequence[int] = (), floor: float | None = None
) -> Chart:
    """Curves over steps.

    Args:
        title: Of the chart.
        curves: By name; none is empty.
        resumed: Steps that get a mark, because the run was resumed there.
        floor: A value that the axis begins at or below.
    """
    thinned = {name: thin(series) for name, series in curves.items()}
    lows = [float(curve.low.min()) for curve in thinned.values()]
    low = min(lows) if floor is None else min(floor, *lows)
    high = max(float(curve.high.max()) for curve in thinned.values())
    plane = _Plane(_first(curves), _last(curves), low, high)
    shapes = [plane.axes(), plane.marks(resumed)]
    for place, curve in enumerate(thinned.values()):
        colour = f"c{place % COLOURS}"
        if curve.every > 1:
            shapes.append(Markup("<path class='range {}' d='{}'/>").format(colour, plane.band(curve)))
        if len(curve.steps) == 1:
            x, y = plane.x(curve.steps[0]), plane.y(curve.values[0])
            shapes.append(Markup("<circle class='dot {}' cx='{:.1f}' cy='{:.1f}' r='3'/>").format(colour, x, y))
        else:
            shapes.append(
                Markup("<path class='line {}' d='{}'/>").format(colour, plane.path(curve.steps, curve.values))
            )
    said = "; ".join(f"{name}: {_in_words(series)}" for name, series in curves.items())
    return Chart(title, _svg(f"{title}. {said}", shapes), list(curves), plane.data(thinned), _notes(curves, thinned))


def stacked_chart(title: str, curves: Mapping[str, Series], resumed: Sequence[int] = ()) -> Chart:
    """Curves on top of each other; one that has no point at a step counts nothing there."""
    steps = np.unique(np.concatenate([series.steps for series in curves.values()]))
    filled = {}
    for name, series in curves.items():
        values = np.zeros(len(steps))
        values[np.searchsorted(steps, series.steps)] = series.values
        filled[name] = Series(steps, values, series.not_finite)
    thinned = {name: thin(series) for name, series in filled.items()}
    plane = _Plane(
        _first(curves), _last(curves), 0.0, float(np.sum([curve.values for curve in thinned.values()], axis=0).max())
    )
    below = np.zeros_like(next(iter(thinned.values())).values)
    shapes = [plane.axes()]
    for place, curve in enumerate(thinned.values()):
        layer = Thinned(curve.steps, curve.values, below, below + curve.values, curve.every)
        shapes.append(Markup("<path class='layer c{}' d='{}'/>").format(place % COLOURS, plane.band(layer)))
        below = layer.high
    total = sum(float(series.values.sum()) for series in filled.values()) or 1.0
    said = ", ".join(f"{name} {float(series.values.sum()) / total:.0%}" for name, series in filled.items())
    shapes.append(plane.marks(resumed))
    notes = [note for note in _notes(filled, thinned) if "range" not in note]
    every = next(iter(thinned.values())).every
    notes += [f"A point is the mean of {every} steps."] if every > 1 else []
    return Chart(title, _svg(f"{title}. Shares: {said}", shapes), list(curves), plane.data(thinned), notes)


class _Plane:
    """Where values lie in the picture."""

    def __init__(self, first: float, last: float, low: float, high: float) -> None:
        self.first, self.last = (first, last) if last > first else (first - 0.5, first + 0.5)
        if high - low <= 1e-12 * max(abs(high), abs(low)):
            low, high = low - (abs(low) / 10 or 0.5), high + (abs(high) / 10 or 0.5)
        self.ticks = MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        self.low, self.high = float(self.ticks[0]), float(self.ticks[-1])

    def x(self, step: float) -> float:
        return LEFT + (step - self.first) / (self.last - self.first) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return TOP + (self.high - value) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)

    def path(self, steps: Array, values: Array) -> str:
        points = (f"{self.x(step):.1f} {self.y(value):.1f}" for step, value in zip(steps, values, strict=True))
        return "M" + "L".join(points)

    def band(self, curve: Thinned) -> str:
        back = self.path(curve.steps[::-1], curve.low[::-1]).replace("M", "L", 1)
        return f"{self.path(curve.steps, curve.high)}{back}Z"

    def axes(self) -> Markup:
        parts = []
        for tick in self.ticks:
            y = self.y(tick)
            parts.append(Markup("<path class='grid' d='M{} {:.1f}H{}'/>").format(LEFT, y, WIDTH - RIGHT))
            label = number(float(tick)) if abs(tick) > 1e-12 * (self.high - self.low) else "0"
            parts.append(Markup("<text x='{}' y='{:.1f}' text-anchor='end'>{}</text>").format(LEFT - 5, y + 3.5, label))
        steps = MaxNLocator(nbins=5, integer=True).tick_values(self.first, self.last)
        parts += [
            Markup("<text x='{:.1f}' y='{}' text-anchor='middle'>{}</text>").format(
                self.x(tick), HEIGHT - 8, number(float(tick))
            )
            for tick in steps
            if self.first <= tick <= self.last and tick == round(tick)
        ]
        return Markup("").join(parts)

    def marks(self, resumed: Sequence[int]) -> Markup:
        inside = [step for step in resumed if self.first <= step <= self.last]
        return Markup("").join(
            Markup("<path class='resumed' d='M{:.1f} {}V{}'/>").format(self.x(step), TOP, HEIGHT - BOTTOM)
            for step in inside
        )

    def data(self, thinned: Mapping[str, Thinned]) -> dict[str, Any]:
        """What the script needs to show values where the pointer is."""
        return {
            "plane": [self.first, self.last, LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM, WIDTH],
            "curves": [
                [name, [round(step, 1) for step in curve.steps.tolist()], [number(v) for v in curve.values.tolist()]]
                for name, curve in thinned.items()
            ],
        }


def _svg(said: str, shapes: Sequence[Markup]) -> Markup:
    return Markup("<svg viewBox='0 0 {} {}' role='img' aria-label='{}'>{}</svg>").format(
        WIDTH, HEIGHT, said, Markup("").join(shapes)
    )


def _in_words(series: Series) -> str:
    steps, values = series.steps, series.values
    return (
        f"{number(float(values[0]))} at step {steps[0]}, {number(float(values[-1]))} at step {steps[-1]}, between "
        f"{number(float(values.min()))} and {number(float(values.max()))}"
    )


def _notes(curves: Mapping[str, Series], thinned: Mapping[str, Thinned]) -> list[str]:
    notes = []
    most = max(curve.every for curve in thinned.values())
    if most > 1:
        notes.append(f"The line is the mean of {most} neighbouring points, the shade their range.")
    for name, series in curves.items():
        if series.not_finite:
            notes.append(f"{name} was no number at {series.not_finite} steps.")
    return notes


def _first(curves: Mapping[str, Series]) -> float:
    return float(min(int(series.steps[0]) for series in curves.values()))


def _last(curves: Mapping[str, Series]) -> float:
    return float(max(int(series.steps[-1]) for series in curves.values()))
