"""`observe-r1 ladder import`: a ladder from the user's own questions."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from observe_r1.ladder.columns import PRESETS, Columns, Format
from observe_r1.ladder.curriculum import PAPER_MIXING, Curriculum, Mixing, mix, split_held_out
from observe_r1.ladder.images import DEFAULT_MAX_PIXELS, StoredImage
from observe_r1.ladder.rows import sample_of
from observe_r1.ladder.sample import BadSample, Sample
from observe_r1.ladder.shards import appearing_at_once, write_shards
from observe_r1.ladder.staging import Staging
from observe_r1.ladder.tables import Row, read_rows
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
    format: Format = "auto",
    columns: Columns = Columns(),
    source: str = "",
    image_root: Path | None = None,
    limit: int | None = None,
    samples_per_shard: int = 1000,
    holdout: int = 0,
    order: Literal["curriculum", "input"] = "curriculum",
    mixing: Literal["paper", "none"] = "paper",
    system_prompt: str | None = None,
    max_image_pixels: int = DEFAULT_MAX_PIXELS,
    seed: int = 0,
) -> ImportReport:
    """Make a ladder of tar shards from questions with images: JSON, JSON Lines, parquet, or a folder of such files.

    Rows with a difficulty are ordered from easy to hard; without difficulties the order of the input stays. A row that
    cannot be used is listed in OUTPUT/skipped.jsonl with its number and the reason, and counted in the closing table.
    A few rows are in memory at a time, however long the input is.

    Args:
        input: A file, or a folder with tables and pictures.
        output: Directory of the new ladder; must not exist yet, or be empty.
        format: What the columns are called. `auto` reads it off every row: a row with `message` or `messages` is in
            the format of the Observe-R1 release, one with `conversations` in that of MM-Eureka, one with `problem` in
            that of Geometry3K, one with `question` in that of ViRL39K or MMK12.
        columns: Names of columns that are not as the format has them; a `question` or `messages` alone is enough.
        source: Name of the data set, for rows that do not name theirs.
        image_root: Where the images lie; relative paths are looked up here, then beside the table. null: beside the
            table, then in the folder that is imported.
        limit: Read no more than this many rows.
        samples_per_shard: Samples in one tar file.
        holdout: Keep this many samples out of the ladder and write them to OUTPUT/held_out, spread evenly over it.
        order: `input` keeps the order of the rows whatever difficulties they bring, for a ladder that is yet to be
            measured with `ladder build`; `curriculum` orders by difficulty where rows have one.
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
    if format != "auto" and format not in PRESETS:
        raise ValueError(f"format is {format!r}; choose one of auto, {', '.join(PRESETS)}")
    console = Console(stderr=True)
    report = ImportReport()
    with appearing_at_once(output) as unfinished, _Skips(unfinished / SKIPPED_FILE, report.skipped) as skips:
        # Staged in the order of the input: what the order depends on is known only after the last row.
        staging = Staging(unfinished / "staging")
        rows = _progress(islice(read_rows(input), limit), "reading", console)

        def sample(row: Row) -> Sample[StoredImage]:
            return sample_of(
                row.content,
                row.default_id,
                [row.file.parent, *([input] if input.is_dir() else [])],
                format=format,
                columns=columns,
                source=source,
                image_root=image_root,
                system_prompt=system_prompt,
                max_image_pixels=max_image_pixels,
            )

        samples = _usable(rows, sample, staging, skips, input)
        staged = write_shards(samples, staging.directory, samples_per_shard, {})
        staging.locate([staging.directory / shard.file for shard in staged.shards])
        _refuse_golds(staging, skips)
        by_difficulty = order == "curriculum" and staging.has_difficulties
        train, held_out = _plan(staging, skips, by_difficulty, holdout, MIXINGS[mixing], seed)
        report.samples, report.held_out = len(train.order), len(held_out.order)
        report.order = "curriculum" if by_difficulty else "input"
        matrix = MIXINGS[mixing] if by_difficulty else None
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
        ordered = _progress(_arranged(staging, train), "writing", console, len(train.order))
        write_shards(ordered, unfinished, samples_per_shard, built)
        if held_out.order:
            (unfinished / HELD_OUT).mkdir()
            write_shards(_arranged(staging, held_out), unfinished / HELD_OUT, samples_per_shard, built)
        staging.close()
        shutil.rmtree(staging.directory)
    _print_summary(report, output, console)
    return report


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

    def add(self, file: Path, row: int, bad: BadSample) -> None:
        self.counts[bad.reason] += 1
        self._examples.setdefault(bad.reason, f"row {row}: {bad.detail}")
        # Escaped: a detail may quote text that is not valid Unicode.
        skip = {"row": row, "reason": bad.reason, "detail": bad.detail, "file": file.name}
        self._file.write(json.dumps(skip) + "\n")

    def __str__(self) -> str:
        lines = [f"{count} {reason} ({self._examples[reason]})" for reason, count in self.counts.most_common()]
        return "; ".join(lines) or "it has no rows"


def _usable(
    rows: Iterable[Row],
    sample_of_row: Callable[[Row], Sample[StoredImage]],
    staging: Staging,
    skips: _Skips,
    input: Path,
) -> Iterator[Sample[StoredImage]]:
    """The samples of the usable rows, each noted in the staging."""
    used = 0
    for row in rows:
        try:
            sample = sample_of_row(row)
            staging.add(row.file, row.number, sample)
        except BadSample as bad:
            skips.add(row.file, row.number, bad)
            continue
        used += 1
        yield sample
    if not used:
        raise ValueError(f"no row of {input} can be used: {skips}")


def _refuse_golds(staging: Staging, skips: _Skips) -> None:
    """Refuse the golds that math-verify cannot compare; its processes start for golds of that kind only."""
    verifier = AnswerVerifier()
    try:
        for batch in staging.golds(GOLDS_PER_BATCH):
            problems = gold_problems([gold for *_, gold in batch], verifier)
            for (number, file, row, _), problem in zip(batch, problems, strict=True):
                if problem is not None:
                    staging.refuse(number)
                    skips.add(file, row, BadSample("gold_unparseable", problem))
    finally:
        verifier.close()


def _plan(
    staging: Staging, skips: _Skips, by_difficulty: bool, holdout: int, mixing: Mixing | None, seed: int
) -> tuple[Curriculum, Curriculum]:
    """The order of the ladder and of its held-out part, as numbers of staged samples."""
    if by_difficulty:
        for number, file, row, id in staging.without_difficulty():
            staging.refuse(number)
            skips.add(file, row, BadSample("difficulty_missing", f"{id} has none, other rows have one"))
    usable = staging.in_order_of_input()
    if not usable:
        raise ValueError(f"no row of the input can be used: {skips}")
    if not by_difficulty:
        kept, held_out = split_held_out(usable, holdout, seed)
        return mix(kept, (), None, seed), mix(held_out, (), None, seed)
    kept, held_out = split_held_out(staging.from_easy_to_hard(), holdout, seed)
    difficulties = staging.difficulties()
    return mix(kept, difficulties, mixing, seed), mix(held_out, difficulties, None, seed)


def _arranged(staging: Staging, curriculum: Curriculum) -> Iterator[Sample[StoredImage]]:
    for number, stage in zip(curriculum.order, curriculum.stages, strict=True):
        yield replace(staging.read(number), stage=stage)


def _progress(items: Iterable[Any], description: str, console: Console, total: int | None = None) -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield from progress.track(items, total=total, description=description)


def _print_summary(report: ImportReport, output: Path, console: Console) -> None:
    table = Table("samples", "count", title=escape(str(output)))
    table.columns[1].justify = "right"
    table.add_row("ladder", str(report.samples))
    if report.held_out:
        table.add_row(HELD_OUT, str(report.held_out))
    for reason, count in report.skipped.most_common():
        table.add_row(f"skipped: {reason}", str(count))
    console.print(table)
    if report.order == "input":
        console.print("The samples keep the order of the input: no row has a difficulty, or `order` says so.")
    if report.skipped:
        console.print(f"Skipped rows are listed in {output / SKIPPED_FILE}.", markup=False)
    console.print(
        f"Next: observe-r1 audit {output}, then fit with --data.ladder {output}.", markup=False, soft_wrap=True
    )
