"""What a ladder holds, how its levels are mixed, and what is wrong with it."""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from observe_r1.answers import gold_kind
from observe_r1.ladder.curriculum import Mixing
from observe_r1.ladder.images import DEFAULT_MAX_PIXELS, StoredImage, check_header
from observe_r1.ladder.manifest import FILE_NAME, Manifest, level_name
from observe_r1.ladder.sample import BadSample, Sample
from observe_r1.ladder.stored import StoredLadder

HELD_OUT = "held_out"
UNKNOWN = "unknown"
FEW = 20  # samples of a stage below which its shares say nothing


@dataclass
class Inspection:
    """What was found in a ladder. Counters are by what their name says."""

    name: str
    samples: int = 0
    held_out: int = 0
    shards: int = 0
    bytes: int = 0
    built: Mapping[str, Any] = field(default_factory=dict)
    sources: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)  # kinds of golds
    images: Counter[int] = field(default_factory=Counter)  # samples by their number of images
    sizes: Counter[int] = field(default_factory=Counter)  # images by the power of two of their pixels
    levels: Counter[str] = field(default_factory=Counter)
    complexities: list[float] = field(default_factory=list)
    tokens_by_level: dict[str, float] = field(default_factory=dict)  # mean complexity
    stages: dict[float, Counter[float]] = field(default_factory=dict)  # stage: samples by difficulty
    mixing: Mixing | None = None  # that the ladder asks for
    examples: dict[str, list[Sample[StoredImage]]] = field(default_factory=dict)  # by level
    problems: list[str] = field(default_factory=list)

    @property
    def level_names(self) -> list[str]:
        """The levels from easy to hard, the unknown one last."""
        return sorted(self.levels, key=lambda name: (name == UNKNOWN, float(name) if name != UNKNOWN else 0.0))

    def obtained(self) -> tuple[list[float], list[float], list[list[float]]]:
        """Stages, levels and the share of each level in each stage, as they are."""
        mixing = self.mixing
        levels = list(mixing.levels) if mixing else sorted({level for row in self.stages.values() for level in row})
        stages = sorted({*self.stages, *(mixing.stages if mixing else ())})
        shares = []
        for stage in stages:
            row = [0] * len(levels)
            for difficulty, count in self.stages.get(stage, Counter()).items():
                row[min(range(len(levels)), key=lambda n: (abs(levels[n] - difficulty), n))] += count
            total = sum(row)
            shares.append([count / total if total else 0.0 for count in row])
        return stages, levels, shares

    def asked(self) -> list[list[float]] | None:
        """The shares that the mixing matrix asks for, or None without one."""
        if self.mixing is None:
            return None
        return [[share / sum(row) for share in row] for row in self.mixing.shares]


def inspect(directory: Path, examples: int = 3, limit: int | None = None) -> Inspection:
    """Reads a ladder and says what it holds."""
    stored = StoredLadder([directory])
    found = Inspection(directory.name or str(directory), len(stored), shards=len(stored.tars))
    found.bytes = sum(tar.stat().st_size for tar in stored.tars)
    _read_manifest(directory, found)
    found.problems += [f"{count} shards: {problem}" for problem, count in stored.problems.items()]
    count = min(limit or len(stored), len(stored))
    positions = [number * len(stored) // count for number in range(count)] if count else []
    _count(stored, positions, examples, found)
    return found


def _read_manifest(directory: Path, found: Inspection) -> None:
    if not (directory / FILE_NAME).is_file():
        found.problems.append(f"there is no {FILE_NAME}: nothing says what the ladder should hold")
        return
    manifest = Manifest.load(directory)
    found.built = manifest.built
    found.problems += [f"{name} differs from its checksum in {FILE_NAME}" for name in manifest.verify(directory)]
    if manifest.samples != found.samples:
        found.problems.append(f"the shards hold {found.samples} samples, {FILE_NAME} says {manifest.samples}")
    if (directory / HELD_OUT / FILE_NAME).is_file():
        found.held_out = Manifest.load(directory / HELD_OUT).samples
    mixing = manifest.built.get("mixing")
    if mixing:
        found.mixing = Mixing(
            tuple(mixing["levels"]), tuple(mixing["stages"]), tuple(tuple(row) for row in mixing["shares"])
        )


def _count(stored: StoredLadder, positions: Sequence[int], examples: int, found: Inspection) -> None:
    bad: Counter[str] = Counter()
    details: dict[str, str] = {}
    by_level: dict[str, array[int]] = defaultdict(lambda: array("q"))
    tokens: dict[str, float] = defaultdict(float)
    measured: Counter[str] = Counter()
    ids: Counter[int] = Counter()
    last_stage, backwards = 0.0, 0
    for position in track(positions, "Reading", console=Console(stderr=True), transient=True):
        try:
            sample = stored[position]
            for image in sample.images:
                width, height = check_header(image.data, DEFAULT_MAX_PIXELS).size
                found.sizes[(width * height).bit_length() - 1] += 1
        except BadSample as error:
            bad[error.reason] += 1
            details.setdefault(error.reason, f"position {position}: {error.detail}")
            continue
        level = level_name(sample.difficulty)
        found.levels[level] += 1
        by_level[level].append(position)
        found.sources[sample.source or "no source"] += 1
        found.answers[gold_kind(sample.gold)] += 1
        found.images[len(sample.images)] += 1
        ids[hash(sample.id)] += 1
        if sample.complexity is not None:
            found.complexities.append(sample.complexity)
            tokens[level] += sample.complexity
            measured[level] += 1
        if sample.stage is not None and sample.difficulty is not None:
            found.stages.setdefault(sample.stage, Counter())[sample.difficulty] += 1
            backwards += sample.stage < last_stage
            last_stage = sample.stage
    found.tokens_by_level = {level: tokens[level] / count for level, count in measured.items()}
    for level, members in by_level.items():
        shown = min(examples, len(members))
        found.examples[level] = [stored[members[number * len(members) // shown]] for number in range(shown)]
    found.problems += [f"{count} samples: {reason} ({details[reason]})" for reason, count in bad.most_common()]
    found.problems += list(_doubts(found, backwards, sum(count - 1 for count in ids.values())))


def _doubts(found: Inspection, backwards: int, repeated: int) -> Iterator[str]:
    """What is no defect of a sample, and yet not as it should be."""
    unknown, known = found.levels.get(UNKNOWN, 0), sum(found.levels.values()) - found.levels.get(UNKNOWN, 0)
    if repeated:
        yield f"{repeated} samples have the id of an earlier one"
    if not known:
        yield "no sample has a difficulty: the ladder is in no curriculum order; measure it with `ladder build`"
    elif unknown:
        yield f"{unknown} samples have no difficulty, the others have one"
    if backwards:
        yield f"the stage goes back {backwards} times: the ladder is not in the order of its stages"
    if found.mixing is not None and known and not found.stages:
        yield f"{FILE_NAME} asks for mixed levels, and no sample has a stage"
    stages, levels, shares = found.obtained()
    asked = found.asked()
    empty = [f"{stage:g}" for stage in stages if not found.stages.get(stage)]
    if empty:
        yield (
            f"stages {', '.join(empty)} are empty: with the levels as frequent as they are, the samples fit the other "
            "stages better"
        )
    if asked is not None and found.mixing is not None and found.stages:
        counts = {stage: sum(row.values()) for stage, row in found.stages.items()}
        for stage, row, wanted in zip(
            found.mixing.stages, (shares[stages.index(s)] for s in found.mixing.stages), asked, strict=True
        ):
            if counts.get(stage, 0) < FEW:
                continue
            level, gap = max(
                ((level, have - want) for level, have, want in zip(levels, row, wanted, strict=True)),
                key=lambda pair: abs(pair[1]),
            )
            if abs(gap) > 0.1:
                yield (
                    f"stage {stage:g} has {abs(gap):.0%} {'more' if gap > 0 else 'less'} of level {level:g} than the "
                    "matrix asks for: the levels are not as frequent as it would need"
                )
    solved = found.levels.get("0", 0) + found.levels.get("1", 0)
    if known and solved / known > 0.6:
        yield f"{solved / known:.0%} of the samples are always or never answered rightly: they teach GRPO nothing"
