"""`observe-r1 ladder import`: a ladder from the user's own questions."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from observe_r1.answers import Gold
from observe_r1.ladder.curriculum import PAPER_MIXING, Curriculum, arrange, split_held_out
from observe_r1.ladder.images import DEFAULT_MAX_PIXELS, StoredImage
from observe_r1.ladder.index import SampleSpan, open_index
from observe_r1.ladder.reader import read_stored
from observe_r1.ladder.rows import read_rows, sample_of
from observe_r1.ladder.sample import BadSample, Sample
from observe_r1.ladder.shards import appearing_at_once, write_shards
from observe_r1.rewards.accuracy import gold_problems
from observe_r1.rewards.verification import AnswerVerifier

HELD_OUT = "held_out"
SKIPPED_FILE = "skipped.jsonl"
GOLDS_PER_BATCH = 256  # compared within one time limit
MIXINGS = {"paper": PAPER_MIXING, "none": None}


@dataclass
class ImportReport:
    """What an import made of the rows it read."""

    samples: int = 0  # in the ladder
    held_out: int = 0  # in its held-out part
    skipped: Counter[str] = field(default_factory=Counter)  # rows by reason
    order: Literal["curriculum", "input"] = "input"


def import_ladder(
    input: Path,
    output: Path,
    *,
    image_root: Path | None = None,
    limit: int | None = None,
    samples_per_shard: int = 1000,
    holdout: int = 0,
    mixing: Literal["paper", "none"] = "paper",
    system_prompt: str | None = None,
    max_image_pixels: int = DEFAULT_MAX_PIXELS,
    seed: int = 0,
) -> ImportReport:
    """Make a ladder of tar shards from a JSON or JSON Lines file of questions with images.

    Rows with a difficulty are ordered from easy to hard; without difficulties the order of the input stays. A row that
    cannot be used is listed in OUTPUT/skipped.jsonl with its number and the reason, and counted in the closing table.

    Args:
        input: JSON list, or JSON Lines, in the format of the Observe-R1 release: `message`, `answer`, and where known
            `id`, `source`, `difficulty`, `complexity`.
        output: Directory of the new ladder; must not exist yet, or be empty.
        image_root: Where the images lie; relative paths are looked up here, then beside the input.
        limit: Read no more than this many rows.
        samples_per_shard: Samples in one tar file.
        holdout: Keep this many samples out of the ladder and write them to OUTPUT/held_out, spread evenly over it.
        mixing: `paper` mixes the levels of difficulty into stages as the paper does; `none` keeps them apart.
        system_prompt: Takes the place of the rows' system messages; null keeps them.
        max_image_pixels: Larger images (width × height) are refused.
        seed: Of the order within stages and of the choice of held-out samples.

    Raises:
        FileNotFoundError: There is no such input.
        ValueError: The input cannot be parsed, no row can be used, too many are to be held out, an option is out of
            range, or the output exists.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1, or left out to read every row")
    if holdout < 0:
        raise ValueError(f"holdout is {holdout}; it must be at least 0")
    if mixing not in MIXINGS:
        raise ValueError(f"mixing is {mixing!r}; choose one of {', '.join(MIXINGS)}")
    console = Console(stderr=True)
    report = ImportReport()
    with appearing_at_once(output) as unfinished, _Skips(unfinished / SKIPPED_FILE, report.skipped) as skips:
        # Staged in the order of the input: what the order depends on is known only after the last row.
        staging = unfinished / "staging"
        staging.mkdir()
        entries: list[_Entry] = []
        with input.open("rb") as file:
            rows = _progress(_limited(read_rows(file), limit), "reading", console)
            samples = _usable(rows, entries, skips, input, image_root, system_prompt, max_image_pixels)
            staged = write_shards(samples, staging, samples_per_shard, {})
        tars = [staging / shard.file for shard in staged.shards]
        spans = [(tar, span) for tar in tars for span in open_index(tar).spans]

        _refuse_golds(entries, skips)
        train, held_out = _plan(entries, skips, holdout, mixing, seed)
        report.samples, report.held_out = len(train.order), len(held_out.order)
        report.order = "curriculum" if _has_difficulties(entries) else "input"
        matrix = MIXINGS[mixing] if report.order == "curriculum" else None
        built = {
            "by": "observe-r1 ladder import",
            "input": input.name,
            "limit": limit,
            "order": report.order,
            "mixing": None if matrix is None else asdict(matrix),
            "holdout": holdout,
            "seed": seed,
            "skipped": dict(sorted(report.skipped.items())),
            "system_prompt": system_prompt,
        }
        ordered = _progress(_arranged(spans, train), "writing", console, len(train.order))
        write_shards(ordered, unfinished, samples_per_shard, built)
        if held_out.order:
            (unfinished / HELD_OUT).mkdir()
            write_shards(_arranged(spans, held_out), unfinished / HELD_OUT, samples_per_shard, built)
        shutil.rmtree(staging)
    _print_summary(report, output, console)
    return report


@dataclass
class _Entry:
    """What the order depends on, of one staged sample."""

    row: int
    id: str
    gold: Gold
    difficulty: float | None
    complexity: float | None
    refused: bool = False  # after all: its gold cannot be compared, or it lacks the difficulty that others have


class _Skips:
    """Writes down the rows that are not used, and counts them."""

    def __init__(self, path: Path, counts: Counter[str]) -> None:
        self.counts = counts
        self._examples: dict[str, str] = {}
        self._file: TextIO = path.open("w", encoding="utf-8")

    def __enter__(self) -> _Skips:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, row: int, bad: BadSample) -> None:
        self.counts[bad.reason] += 1
        self._examples.setdefault(bad.reason, f"row {row}: {bad.detail}")
        # Escaped: a detail may quote text that is not valid Unicode.
        self._file.write(json.dumps({"row": row, "reason": bad.reason, "detail": bad.detail}) + "\n")

    def __str__(self) -> str:
        lines = [f"{count} {reason} ({self._examples[reason]})" for reason, count in self.counts.most_common()]
        return "; ".join(lines) or "it has no rows"


def _limited(rows: Iterable[tuple[int, Any]], limit: int | None) -> Iterator[tuple[int, Any]]:
    for count, row in enumerate(rows, start=1):
        yield row
        if count == limit:
            return


def _usable(
    rows: Iterable[tuple[int, Any]],
    entries: list[_Entry],
    skips: _Skips,
    input: Path,
    image_root: Path | None,
    system_prompt: str | None,
    max_image_pixels: int,
) -> Iterator[Sample[StoredImage]]:
    """The samples of the usable rows; `entries` receives one entry for each."""
    ids: set[str] = set()
    for number, row in rows:
        try:
            sample = sample_of(
                row,
                f"{input.stem}-{number}",
                input.parent,
                image_root=image_root,
                system_prompt=system_prompt,
                max_image_pixels=max_image_pixels,
            )
            if sample.id in ids:
                raise BadSample("id_duplicate", sample.id)
        except BadSample as bad:
            skips.add(number, bad)
            continue
        ids.add(sample.id)
        entries.append(_Entry(number, sample.id, sample.gold, sample.difficulty, sample.complexity))
        yield sample
    if not entries:
        raise ValueError(f"no row of {input} can be used: {skips}")


def _refuse_golds(entries: Sequence[_Entry], skips: _Skips) -> None:
    """Refuse the golds that math-verify cannot compare; its processes start for golds of that kind only."""
    verifier = AnswerVerifier()
    try:
        for start in range(0, len(entries), GOLDS_PER_BATCH):
            batch = entries[start : start + GOLDS_PER_BATCH]
            for entry, problem in zip(batch, gold_problems([entry.gold for entry in batch], verifier), strict=True):
                if problem is not None:
                    entry.refused = True
                    skips.add(entry.row, BadSample("gold_unparseable", problem))
    finally:
        verifier.close()


def _has_difficulties(entries: Sequence[_Entry]) -> bool:
    return any(entry.difficulty is not None for entry in entries if not entry.refused)


def _plan(
    entries: Sequence[_Entry], skips: _Skips, holdout: int, mixing: str, seed: int
) -> tuple[Curriculum, Curriculum]:
    """The order of the ladder and of its held-out part, as indices into `entries`."""
    if _has_difficulties(entries):
        for entry in entries:
            if entry.difficulty is None and not entry.refused:
                entry.refused = True
                skips.add(entry.row, BadSample("difficulty_missing", f"{entry.id} has none, other rows have one"))
    usable = [index for index, entry in enumerate(entries) if not entry.refused]
    if not usable:
        raise ValueError(f"no row of the input can be used: {skips}")
    if not _has_difficulties(entries):
        kept, held_out = split_held_out(usable, holdout, seed)
        return Curriculum(tuple(kept), (None,) * len(kept)), Curriculum(tuple(held_out), (None,) * len(held_out))

    def arranged(subset: Sequence[int], name: str) -> Curriculum:
        difficulties = [entries[index].difficulty or 0.0 for index in subset]
        complexities = [entries[index].complexity for index in subset]
        ids = [entries[index].id for index in subset]
        curriculum = arrange(difficulties, complexities, ids, MIXINGS[name], seed)
        return replace(curriculum, order=tuple(subset[place] for place in curriculum.order))

    kept, held_out = split_held_out(arranged(usable, "none").order, holdout, seed)
    return arranged(kept, mixing), arranged(held_out, "none")


def _arranged(spans: Sequence[tuple[Path, SampleSpan]], curriculum: Curriculum) -> Iterator[Sample[StoredImage]]:
    for index, stage in zip(curriculum.order, curriculum.stages, strict=True):
        tar, span = spans[index]
        yield replace(read_stored(tar, span), stage=stage)


def _progress(items: Iterable[Any], description: str, console: Console, total: int | None = None) -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield from progress.track(items, total=total, description=description)


def _print_summary(report: ImportReport, output: Path, console: Console) -> None:
    table = Table("samples", "count", title=str(output))
    table.columns[1].justify = "right"
    table.add_row("ladder", str(report.samples))
    if report.held_out:
        table.add_row(HELD_OUT, str(report.held_out))
    for reason, count in report.skipped.most_common():
        table.add_row(f"skipped: {reason}", str(count))
    console.print(table)
    if report.order == "input":
        console.print("No row has a difficulty: the samples keep the order of the input.")
    if report.skipped:
        console.print(f"Skipped rows are listed in {output / SKIPPED_FILE}.")
