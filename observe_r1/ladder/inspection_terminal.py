"""An inspection as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from observe_r1.ladder.inspection import Inspection

BAR = 32  # characters of the longest one
BINS = 12  # at most


def print_report(found: Inspection, console: Console) -> None:
    """Counts, histograms, the mixing matrix and the problems."""
    console.rule(escape(found.name))
    held_out = f", {found.held_out} held out" if found.held_out else ""
    console.print(f"{found.samples} samples{held_out} in {shards(found)}, {found.bytes / 1e6:.1f} MB")
    for title, counts in (("source", found.sources), ("answer", found.answers), ("images", found.images)):
        shown = ", ".join(f"{name} {count}" for name, count in counts.most_common(8))
        more = f", and {len(counts) - 8} more" if len(counts) > 8 else ""
        console.print(f"{title}: {escape(shown)}{more}")
    levels = {name: found.levels[name] for name in found.level_names}
    notes = {name: f"{found.tokens_by_level[name]:.0f} tokens" for name in levels if name in found.tokens_by_level}
    console.print(_bars("difficulty", levels, notes))
    if found.complexities:
        console.print(_bars("complexity, tokens", complexity_histogram(found)))
    if found.stages:
        console.print(_matrix(found))
    for problem in found.problems:
        console.print(Text(f"! {problem}", style="yellow"))
    if not found.problems:
        console.print("No problems found.")


def shards(found: Inspection) -> str:
    return "1 shard" if found.shards == 1 else f"{found.shards} shards"


def complexity_histogram(found: Inspection) -> dict[str, int]:
    """Samples by mean length."""
    lowest, highest = math.floor(min(found.complexities)), math.floor(max(found.complexities)) + 1
    width = -(-(highest - lowest) // BINS)
    edges = range(lowest, highest + width, width)
    counts, _ = np.histogram(found.complexities, bins=list(edges))
    return {f"{low}–{low + width}": int(count) for low, count in zip(edges, counts, strict=False)}


def _bars(title: str, counts: Mapping[str, int], notes: Mapping[str, str] | None = None) -> Table:
    table = Table(title, "samples", "", *(["mean complexity"] if notes else []), box=None)
    table.columns[1].justify = "right"
    largest = max(counts.values(), default=1)
    for name, count in counts.items():
        bar = "█" * round(BAR * count / largest)
        table.add_row(name, str(count), f"[cyan]{bar}[/]", *([notes.get(name, "")] if notes else []))
    return table


def _matrix(found: Inspection) -> Table:
    """Each stage: its samples, and the share of each level, asked for → obtained."""
    stages, levels, obtained = found.obtained()
    asked = found.asked()
    rows = dict(zip(found.mixing.stages, asked, strict=True)) if found.mixing and asked else {}
    table = Table("stage", "samples", *(f"{level:g}" for level in levels), box=None, padding=(0, 1))
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    table.title = "share of each difficulty: obtained (asked for)" if rows else "share of each difficulty"
    table.title_justify = "left"
    for stage, shares in zip(stages, obtained, strict=True):
        size = sum(found.stages.get(stage, {}).values())
        table.add_row(f"{stage:g}", str(size), *_cells(shares, rows.get(stage)))
    return table


def _cells(shares: Sequence[float], asked: Sequence[float] | None) -> list[str]:
    wanted = asked or [0.0] * len(shares)
    cells = []
    for share, want in zip(shares, wanted, strict=True):
        text = "·" if not share else f"{share:.0%}"
        cells.append(f"{text} [dim]({want:.0%})[/]" if asked and (share or want) else text)
    return cells
