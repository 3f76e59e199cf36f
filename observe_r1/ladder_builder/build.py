"""`observe-r1 ladder build`: from imported questions to a ladder whose difficulties are measured.

The way of a question:
  1. screening: it can be read, its gold is equal to itself and refuses wrong answers, it is new and in no benchmark
  2. simple questions, optional: a policy that is asked for nothing but the answer gets it wrong
  3. rollouts: N answers give its difficulty (1 − pass rate) and its complexity (mean tokens)
  4. label noise: it is not hard and yet answered in few words
  5. order: by difficulty and complexity, levels mixed into stages, written to shards

Steps 1 to 3 keep a journal of finished blocks in a work directory. A build that is killed continues with the next
block, and the ladder is the same, byte for byte. Steps 4 and 5 take seconds and start anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from observe_r1.encoding import PromptOptions
from observe_r1.ladder.curriculum import PAPER_MIXING, Curriculum, Mixing, mix, split_held_out
from observe_r1.ladder.images import StoredImage
from observe_r1.ladder.journal import BlockJournal
from observe_r1.ladder.manifest import FILE_NAME
from observe_r1.ladder.measurement import Measurement
from observe_r1.ladder.sample import Sample
from observe_r1.ladder.screening import Contamination, ContaminationOptions, drop_known, screen
from observe_r1.ladder.selection import LabelNoiseOptions, noise_reasons
from observe_r1.ladder.shards import write_shards
from observe_r1.ladder.stored import StoredLadder
from observe_r1.ladder_builder.measuring import BuildTrainer, MeasuringOptions, Questions, Rollouts, finish, measure
from observe_r1.loading import PolicyOptions
from observe_r1.rewards import AccuracyReward
from observe_r1.rollout import RolloutEngine, SamplingOptions

HELD_OUT = "held_out"
DROPPED_FILE = "dropped.jsonl"
SCREENED_PER_BLOCK = 128


@dataclass
class SimpleQuestions:
    """A policy that answers without reasoning; what it gets right is too simple for the ladder.

    Args:
        policy: The model, usually a small one.
        instruction: What it is asked for after the question, in place of the system message.
        max_new_tokens: Longest answer.
        rollout: The engine; null: the model itself.
    """

    policy: PolicyOptions
    instruction: str = "Give only the final answer."
    max_new_tokens: int = 64
    rollout: RolloutEngine | None = None

    def rollouts(self, max_prompt_tokens: int) -> Rollouts:
        """One greedy answer, judged as a whole where it has no answer block."""
        return Rollouts(
            self.policy,
            PromptOptions(system_prompt=None, max_prompt_tokens=max_prompt_tokens),
            SamplingOptions(1, temperature=0.0, max_new_tokens=self.max_new_tokens),
            self.rollout,
            AccuracyReward(untagged="whole"),
        )


@dataclass
class BuildReport:
    """What a build made of the questions it was given."""

    questions: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # by reason
    samples: int = 0  # in the ladder
    held_out: int = 0


def build_ladder(
    sources: list[Path] | Path,
    output: Path,
    rollouts: Rollouts,
    trainer: BuildTrainer,
    simple: SimpleQuestions | None = None,
    contamination: ContaminationOptions = ContaminationOptions(),
    label_noise: LabelNoiseOptions = LabelNoiseOptions(),
    mixing: Literal["paper", "none"] | Mixing = "paper",
    max_samples: int | None = None,
    holdout: int = 0,
    samples_per_shard: int = 1000,
    questions_per_block: int = 64,
    workers: int = 0,
    keep_completions: bool = True,
    work: Path | None = None,
    seed: int = 0,
) -> BuildReport:
    """Build a ladder from imported questions: filter them, measure their difficulty by rollouts, order and mix them.

    A build that was interrupted, however, continues where it was when it is started again.

    Args:
        sources: One ladder or several, as `observe-r1 ladder import` makes them; their difficulties are not looked at.
        output: Directory of the new ladder; must not exist yet, or be empty.
        rollouts: Who measures the difficulty.
        trainer: Lightning's Trainer, which runs the rollouts: devices, strategy, precision, callbacks.
        simple: The filter of simple questions; null leaves it out.
        contamination: The benchmarks to stay away from.
        label_noise: What counts as a wrong gold.
        mixing: `paper`, `none`, or levels, stages and shares of one's own.
        max_samples: Keep this many, spread evenly from easy to hard (paper: 20,000); null keeps all.
        holdout: Keep this many samples out of the ladder and write them to OUTPUT/held_out, spread evenly over it.
        samples_per_shard: Samples in one tar file.
        questions_per_block: Questions that are answered and kept together: what an interruption can cost.
        workers: Processes that read and encode ahead.
        keep_completions: Keep the sampled texts in the work directory.
        work: Where unfinished work is kept; null: OUTPUT.work. Delete it when you do not want to build again.
        seed: Of the sampling, the order within stages and the choice of held-out samples.

    Raises:
        ValueError: A source is no ladder, the work directory belongs to other settings or another running build, no
            question remains, an option is out of range, or the output exists.
    """
    sources = sources if isinstance(sources, list) else [sources]
    if questions_per_block < 1:
        raise ValueError(f"questions_per_block is {questions_per_block}; it must be at least 1")
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples is {max_samples}; it must be at least 1, or null for all")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists already; choose another directory or delete it first")
    work = work or output.with_name(f"{output.name}.work")
    rank = trainer.global_rank
    with _locked(work) if rank == 0 else nullcontext():
        stored = StoredLadder(sources)
        drops = _Drops()
        given = {"sources": [[source.name, _digest(stored, source)] for source in sources]}
        options = MeasuringOptions(seed, questions_per_block, workers, keep_completions)
        screening = _screening(work / "1-screening", given, stored, rollouts.accuracy, rank)
        ids: dict[int, str] = {}
        candidates = drops.sift(_named(drop_known(screening.records(), Contamination(contamination)), ids))
        if simple is not None:
            settings = {**given, "instruction": simple.instruction}
            questions = Questions(stored.tars, simple.instruction)
            asked = simple.rollouts(rollouts.prompt.max_prompt_tokens)
            journal = measure(work / "2-simple", settings, questions, candidates, asked, trainer, options)
            candidates = drops.sift(_too_simple(journal))
        journal = measure(work / "3-rollouts", given, Questions(stored.tars), candidates, rollouts, trainer, options)
        if rank:
            return BuildReport()
        measured = _measured(journal, drops, label_noise)
        train, held_out = _plan(measured, ids, drops, len(stored), _matrix(mixing), max_samples, holdout, seed)
        built = {
            "by": "observe-r1 ladder build",
            **given,
            "rollouts": rollouts.settings(seed),
            "simple": None if simple is None else {**asdict(simple.policy), "instruction": simple.instruction},
            "contamination": {**asdict(contamination), "benchmarks": [Path(b).name for b in contamination.benchmarks]},
            "label_noise": asdict(label_noise),
            "mixing": None if (matrix := _matrix(mixing)) is None else asdict(matrix),
            "max_samples": max_samples,
            "holdout": holdout,
            "seed": seed,
            "questions": len(stored),
            "dropped": dict(sorted(drops.counts.items())),
        }
        with _replacing(output) as unfinished:
            drops.save(unfinished / DROPPED_FILE, stored)
            write_shards(_samples(stored, train, measured), unfinished, samples_per_shard, built)
            if held_out.order:
                (unfinished / HELD_OUT).mkdir()
                write_shards(_samples(stored, held_out, measured), unfinished / HELD_OUT, samples_per_shard, built)
    report = BuildReport(len(stored), drops.counts, len(train.order), len(held_out.order))
    _print_summary(report, output)
    return report


class _Drops:
    """The questions that do not get into the ladder, with the reason."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._drops: list[dict[str, Any]] = []

    def add(self, position: int, reason: str, detail: str = "") -> None:
        self.counts[reason] += 1
        self._drops.append({"position": position, "reason": reason, "detail": detail})

    def sift(self, records: Iterable[dict[str, Any]]) -> list[int]:
        """The positions of the records without a reason to be dropped."""
        kept = []
        for record in records:
            if "reason" in record:
                self.add(record["position"], record["reason"], record.get("detail", ""))
            else:
                kept.append(record["position"])
        return kept

    def save(self, path: Path, stored: StoredLadder) -> None:
        with path.open("w", encoding="utf-8") as file:
            for drop in sorted(self._drops, key=lambda drop: drop["position"]):
                line = {**drop, "shard": str(stored.shard_of(drop["position"]))}
                file.write(json.dumps(line) + "\n")


def _screening(
    directory: Path, settings: dict[str, Any], stored: StoredLadder, accuracy: AccuracyReward | None, rank: int
) -> BlockJournal:
    settings = {**settings, "accuracy": None if accuracy is None else type(accuracy).__name__}
    journal = BlockJournal(directory, settings, -(-len(stored) // SCREENED_PER_BLOCK))
    if rank == 0 and (pending := journal.pending()):
        reward, writer = accuracy or AccuracyReward(), journal.writer()
        try:
            for block in track(pending, "Screening", console=Console(stderr=True)):
                start = block * SCREENED_PER_BLOCK
                writer.write(block, screen(list(stored.samples(start, start + SCREENED_PER_BLOCK)), reward))
        finally:
            reward.close()
            writer.close()
    finish(journal, rank)
    return journal


def _named(records: Iterable[dict[str, Any]], ids: dict[int, str]) -> Iterator[dict[str, Any]]:
    """The records; `ids` receives the names of those that stay, and a name that comes twice is a reason to go."""
    names: set[str] = set()
    for record in records:
        if "reason" not in record:
            if record["id"] in names:
                record |= {"reason": "id_duplicate", "detail": record["id"]}
            else:
                names.add(record["id"])
                ids[record["position"]] = record["id"]
        yield record


def _too_simple(journal: BlockJournal) -> Iterator[dict[str, Any]]:
    for record in journal.records():
        if record.get("n_correct"):
            record |= {"reason": "simple_question"}
        yield record


def _measured(journal: BlockJournal, drops: _Drops, options: LabelNoiseOptions) -> dict[int, Measurement]:
    """The measurements of the questions that stay, by position."""
    measured: dict[int, Measurement] = {}
    for record in journal.records():
        if "reason" in record:
            drops.add(record["position"], record["reason"], record["detail"])
        else:
            measured[record["position"]] = Measurement(record["n_correct"], record["lengths"])
    kept = {}
    reasons = noise_reasons(list(measured.values()), options)
    for (position, measurement), reason in zip(measured.items(), reasons, strict=True):
        if reason is None:
            kept[position] = measurement
        else:
            detail = f"difficulty {measurement.difficulty:g}, {measurement.complexity:g} tokens"
            drops.add(position, reason, detail)
    if not kept:
        raise ValueError(f"no question remains: {dict(drops.counts)}")
    return kept


def _plan(
    measured: dict[int, Measurement],
    ids: dict[int, str],
    drops: _Drops,
    size: int,
    matrix: Mixing | None,
    max_samples: int | None,
    holdout: int,
    seed: int,
) -> tuple[Curriculum, Curriculum]:
    """The order of the ladder and of its held-out part, as positions in the sources."""
    ranked = sorted(measured, key=lambda p: (measured[p].difficulty, measured[p].complexity, ids[p]))
    if max_samples is not None and max_samples < len(ranked):
        over, ranked = split_held_out(ranked, max_samples, seed)
        for position in over:
            drops.add(position, "over_max_samples")
    difficulties = [measured[position].difficulty if position in measured else 0.0 for position in range(size)]
    train, held_out = split_held_out(ranked, holdout, seed)
    return mix(train, difficulties, matrix, seed), mix(held_out, difficulties, None, seed)


def _samples(
    stored: StoredLadder, curriculum: Curriculum, measured: dict[int, Measurement]
) -> Iterator[Sample[StoredImage]]:
    order = track(curriculum.order, "Writing", console=Console(stderr=True))
    for position, stage in zip(order, curriculum.stages, strict=True):
        yield replace(stored[position], stage=stage, **measured[position].fields())


def _matrix(mixing: Literal["paper", "none"] | Mixing) -> Mixing | None:
    if isinstance(mixing, Mixing):
        return mixing
    return PAPER_MIXING if mixing == "paper" else None


def _digest(stored: StoredLadder, source: Path) -> str:
    """Of what a source holds: of its manifest, or of the names and sizes of its tars."""
    if (source / FILE_NAME).is_file():
        return hashlib.sha256((source / FILE_NAME).read_bytes()).hexdigest()
    tars = [(tar.name, tar.stat().st_size) for tar in stored.tars if tar.parent == source]
    return hashlib.sha256(json.dumps(tars).encode()).hexdigest()


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Keeps a second build out of the work directory; the lock goes with the process, however it ends."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another build is working in {work}; wait for it, or name another work") from None
        yield


@contextmanager
def _replacing(output: Path) -> Iterator[Path]:
    """A directory that takes the place of `output` when it is complete; what a killed build left of it goes first."""
    unfinished = output.with_name(f".{output.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    unfinished.replace(output)


def _print_summary(report: BuildReport, output: Path) -> None:
    table = Table("questions", "count", title=escape(str(output)))
    table.columns[1].justify = "right"
    table.add_row("given", str(report.questions))
    for reason, count in report.dropped.most_common():
        table.add_row(f"dropped: {reason}", str(count))
    if report.held_out:
        table.add_row(HELD_OUT, str(report.held_out))
    table.add_row("ladder", str(report.samples))
    console = Console(stderr=True)
    console.print(table)
    if report.dropped:
        console.print(f"Dropped questions are listed in {output / DROPPED_FILE}.", markup=False)
