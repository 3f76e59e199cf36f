"""Which saved completions a page shows: some from beginning to end, and the same questions again and again."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

TRAINING, HELD_OUT = "completions.jsonl", "held_out.jsonl"
MOST_ROLLOUTS = 4  # that are shown of the training
GROUPS_PER_ROLLOUT = 3
MOST_QUESTIONS = 12  # that are followed over the training
MOST_MOMENTS = 3  # at which the answers to them are shown in full

Item = TypeVar("Item")


@dataclass(frozen=True)
class Answer:
    """One completion, as it was saved."""

    step: int
    text: str
    correct: bool
    reward: float
    advantage: float
    tokens: int
    truncated: bool
    parts: dict[str, float]


@dataclass
class Question:
    """A question with answers to it; where they are of one rollout, the best and the worst one are shown."""

    text: str
    gold: str
    difficulty: float | None
    pictures: list[Path]
    answers: list[Answer] = field(default_factory=list)

    @property
    def pass_rate(self) -> float:
        return sum(answer.correct for answer in self.answers) / len(self.answers)

    @property
    def best_and_worst(self) -> list[tuple[str, Answer]]:
        ordered = sorted(self.answers, key=lambda answer: -answer.reward)
        return [("best", ordered[0]), ("worst", ordered[-1])]

    @property
    def moments(self) -> list[Answer]:
        """The first, the last and one between."""
        return spread(self.answers, MOST_MOMENTS)


@dataclass
class Completions:
    """What a page shows."""

    rollouts: list[tuple[int, list[Question]]] = field(default_factory=list)  # step: questions
    followed: list[Question] = field(default_factory=list)  # one answer for each validation
    saved_rollouts: int = 0
    unreadable: int = 0  # lines


def read_completions(directories: Sequence[Path], resumed: Sequence[int]) -> Completions:
    """Reads the files of the parts of a run line by line; they may be large, and the last line cut off.

    Args:
        directories: In the order of the training.
        resumed: Steps from which the second, third … part counts.
    """
    found = Completions()
    parts = list(_parts(directories, resumed))
    steps = sorted({int(row["step"]) for row, _ in _rows(parts, TRAINING, found)})
    found.saved_rollouts = len(steps)
    chosen = spread(steps, MOST_ROLLOUTS)
    groups: dict[int, dict[str, Question]] = defaultdict(dict)
    before = -1
    for row, directory in _rows(parts, TRAINING, Completions()):
        step = int(row["step"])
        for again in [later for later in groups if step < before and later >= step]:
            del groups[again]  # trained once more, after a resume in the same directory
        before = step
        if step in chosen:
            _question(groups[step], row, directory).answers.append(_answer(row))
    for step in chosen:
        found.rollouts.append((step, sorted(groups[step].values(), key=_interest)[:GROUPS_PER_ROLLOUT]))
    followed: dict[str, Question] = {}
    for row, directory in _rows(parts, HELD_OUT, found):
        question = _question(followed, row, directory)
        question.answers[:] = [answer for answer in question.answers if answer.step < int(row["step"])]
        question.answers.append(_answer(row))
    # first those to which the answers changed
    changed = sorted(followed.values(), key=lambda question: question.pass_rate in (0.0, 1.0))
    found.followed = changed[:MOST_QUESTIONS]
    return found


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many of them, evenly spread, with the first and the last one."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def _interest(question: Question) -> tuple[bool, bool]:
    """Sorts first what has a picture, then what taught something."""
    return not question.pictures, len({answer.reward for answer in question.answers}) < 2


def _parts(directories: Sequence[Path], resumed: Sequence[int]) -> Iterator[tuple[Path, float]]:
    """Directories with the step from which a later one counts. Several files in one directory share their rows."""
    later = list(resumed)[-(len(directories) - 1) :] if len(directories) > 1 else []
    ends = [*map(float, later), *[float("inf")] * (len(directories) - len(later))]
    return zip((directory / "completions" for directory in directories), ends, strict=True)


def _rows(
    parts: Collection[tuple[Path, float]], name: str, counted: Completions
) -> Iterator[tuple[dict[str, Any], Path]]:
    for directory, end in parts:
        path = directory / name
        if not path.is_file():
            continue
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    row = json.loads(line)
                    is_part = int(row["step"]) < end
                    _answer(row)
                except (ValueError, KeyError, TypeError):
                    counted.unreadable += 1
                    continue
                if is_part:
                    yield row, directory


def _question(known: dict[str, Question], row: dict[str, Any], directory: Path) -> Question:
    name = str(row.get("id"))
    if name not in known:
        difficulty = row.get("difficulty")
        known[name] = Question(
            str(row.get("question", name)),
            str(row.get("gold", "")),
            float(difficulty) if isinstance(difficulty, int | float) else None,
            # names only: a page holds no file from elsewhere
            [directory / "images" / Path(str(picture)).name for picture in row.get("images") or ()],
        )
    return known[name]


def _answer(row: dict[str, Any]) -> Answer:
    return Answer(
        int(row["step"]),
        str(row["completion"]),
        bool(row["correct"]),
        float(row["reward"]),
        float(row.get("advantage", 0.0)),
        int(row["tokens"]),
        bool(row.get("truncated", False)),
        {key.removeprefix("reward/"): float(value) for key, value in row.items() if key.startswith("reward/")},
    )
