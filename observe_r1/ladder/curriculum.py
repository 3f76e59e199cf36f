"""The order of a ladder: from easy to hard, with the levels mixed into stages.

A sample has a level (its difficulty) and, when levels are mixed, a stage (when it comes up). A mixing matrix says which
levels a stage is made of. It does not say how long a stage is: that follows from the samples there are.
"""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FITTING_STEPS = 2000  # beyond the float resolution for histograms the matrix can explain, milliseconds in any case


@dataclass(frozen=True)
class Mixing:
    """Which levels the stages of a curriculum are made of.

    Raises:
        ValueError: The shapes do not agree, a share is negative, or a stage or a level has no share at all.
    """

    levels: tuple[float, ...]  # difficulties, ascending
    stages: tuple[float, ...]  # one name per stage, in the order of training
    shares: tuple[tuple[float, ...], ...]  # [stage][level]; a row is used relative to its sum

    def __post_init__(self) -> None:
        shapes = {len(row) for row in self.shares}
        if len(self.shares) != len(self.stages) or shapes != {len(self.levels)}:
            raise ValueError(
                f"a mixing matrix for {len(self.stages)} stages and {len(self.levels)} levels has one row per stage "
                f"and one column per level; this one has {len(self.shares)} rows of {sorted(shapes)} columns"
            )
        matrix = np.array(self.shares)
        if not np.isfinite(matrix).all() or (matrix < 0).any():
            raise ValueError(f"the shares of a mixing matrix are numbers of at least 0, not {self.shares}")
        if not matrix.sum(axis=1).all() or not matrix.sum(axis=0).all():
            raise ValueError(
                "every stage and every level of a mixing matrix needs a share above 0; drop the empty ones"
            )
        if list(self.levels) != sorted(set(self.levels)):
            raise ValueError(f"the levels of a mixing matrix are ascending, not {self.levels}")


_EIGHTHS = tuple(eighth / 8 for eighth in range(9))

PAPER_MIXING = Mixing(
    levels=_EIGHTHS,
    stages=_EIGHTHS,
    shares=(
        (0.285, 0.174, 0.187, 0.187, 0.167, 0, 0, 0, 0),
        (0.051, 0.497, 0.145, 0.154, 0.147, 0, 0, 0, 0),
        (0.022, 0.076, 0.508, 0.167, 0.225, 0, 0, 0, 0),
        (0, 0.030, 0.067, 0.504, 0.207, 0.192, 0, 0, 0),
        (0, 0, 0.027, 0.067, 0.583, 0.184, 0.134, 0, 0),
        (0, 0, 0, 0.030, 0.101, 0.575, 0.147, 0.147, 0),
        (0, 0, 0, 0, 0.052, 0.113, 0.537, 0.175, 0.121),
        (0, 0, 0, 0, 0.018, 0.056, 0.098, 0.685, 0.142),
        (0, 0, 0, 0, 0.013, 0.043, 0.072, 0.150, 0.718),
    ),
)
"""Read off the chart of the Observe-R1 paper (arXiv 2505.12432), ± 0.01 for each share."""


@dataclass(frozen=True)
class Curriculum:
    """An order of samples: `order[n]` is the sample trained n-th, `stages[n]` its stage (None without mixing)."""

    order: Sequence[int]
    stages: Sequence[float | None]


def arrange(
    difficulties: Sequence[float],
    complexities: Sequence[float | None],
    ids: Sequence[str],
    mixing: Mixing | None = PAPER_MIXING,
    seed: int = 0,
) -> Curriculum:
    """Order samples from easy to hard; every sample is used exactly once.

    Without mixing the order is (difficulty, complexity, id), a sample of unknown complexity after the others of its
    difficulty. With mixing, each level hands its samples out to the stages, the less complex ones to earlier stages,
    and a stage trains what it received in an order drawn from `seed`.

    A level never runs out: its samples are divided among all stages that ask for it, in proportion to what they ask
    for. When the levels are not represented as the matrix would need them, the *stages* give way. Their sizes are those
    which, together with the matrix, explain the numbers of samples per level best (maximum likelihood; where the
    numbers can be met exactly, every stage is composed as the matrix says). A scarce level is then thin in every stage,
    an abundant one makes up more of each, and a stage made of absent levels is empty.

    Args:
        difficulties: 1 − pass rate, for each sample.
        complexities: Mean completion length in tokens, for each sample.
        ids: Break ties, so that the order does not depend on the order of the input.
        mixing: The matrix; a difficulty between two of its levels counts for the nearer one, the lower in a tie.
        seed: Of the order within each stage.

    Raises:
        ValueError: The three sequences differ in length, or a difficulty is not a number in 0 … 1.
    """
    if not len(difficulties) == len(complexities) == len(ids):
        raise ValueError(
            f"{len(difficulties)} difficulties, {len(complexities)} complexities and {len(ids)} ids; "
            "give one of each per sample"
        )
    if wrong := [value for value in difficulties if not 0 <= value <= 1]:
        raise ValueError(f"a difficulty is 1 - pass rate and lies in 0 … 1; found {wrong[0]!r}")

    def rank(sample: int) -> tuple[float, float, str]:
        complexity = complexities[sample]
        return difficulties[sample], math.inf if complexity is None else complexity, ids[sample]

    curriculum = mix(sorted(range(len(ids)), key=rank), difficulties, mixing, seed)
    return Curriculum(tuple(curriculum.order), tuple(curriculum.stages))


def mix(ranked: Sequence[int], difficulties: Sequence[float], mixing: Mixing | None, seed: int) -> Curriculum:
    """Put samples that are ranked from easy to hard into stages, as `arrange` does.

    Args:
        ranked: Sample numbers.
        difficulties: By sample number.
        mixing: The matrix; None keeps the order.
        seed: Of the order within each stage.
    """
    if mixing is None:
        return Curriculum(ranked, (None,) * len(ranked))

    # arrays: of a million samples, lists of numbers take five times as much
    levels = [array("q") for _ in mixing.levels]
    for sample in ranked:
        levels[_nearest(mixing.levels, difficulties[sample])].append(sample)
    counts = stage_counts([len(level) for level in levels], mixing)
    generator = random.Random(seed)
    order = array("q")
    stages: list[float | None] = []
    taken = [0] * len(levels)
    for stage, row in zip(mixing.stages, counts, strict=True):
        members: list[int] = []
        for level, count in enumerate(row):
            members += levels[level][taken[level] : taken[level] + count]
            taken[level] += count
        generator.shuffle(members)
        order.extend(members)
        stages += [stage] * len(members)
    return Curriculum(order, stages)


def stage_counts(level_counts: Sequence[int], mixing: Mixing) -> list[list[int]]:
    """Samples of each level in each stage, `[stage][level]`; the columns add up to `level_counts`.

    The stage sizes are the weights of a mixture whose components are the rows of the matrix, fitted to the histogram of
    levels by expectation maximisation; the fractions that remain are rounded within each level by largest remainder.
    """
    matrix = np.array(mixing.shares, dtype=float)
    matrix /= matrix.sum(axis=1, keepdims=True)
    histogram = np.array(level_counts, dtype=float)
    sizes = np.full(len(matrix), 1.0)
    for _ in range(FITTING_STEPS):
        sizes = _split(matrix, sizes, histogram).sum(axis=1)
    split = _split(matrix, sizes, histogram)
    columns = [_round(column, count) for column, count in zip(split.T, level_counts, strict=True)]
    return [list(row) for row in zip(*columns, strict=True)]


def split_held_out(order: Sequence[int], count: int, seed: int = 0) -> tuple[list[int], list[int]]:
    """Take `count` samples out of `order`: (those that stay, those held out), both in the given order.

    The held-out ones stand at equal distances, from a first one drawn from `seed`. In an order from easy to hard they
    therefore represent the levels as the whole does.

    Raises:
        ValueError: Nothing would remain, or the count is negative.
    """
    if not 0 <= count < max(len(order), 1):
        most = max(len(order) - 1, 0)
        raise ValueError(f"cannot hold out {count} of {len(order)} samples; set holdout to {most} or less")
    offset = random.Random(seed).random()
    chosen = {math.floor((number + offset) * len(order) / count) for number in range(count)}
    return (
        [sample for place, sample in enumerate(order) if place not in chosen],
        [sample for place, sample in enumerate(order) if place in chosen],
    )


def _nearest(levels: Sequence[float], difficulty: float) -> int:
    return min(range(len(levels)), key=lambda level: (abs(levels[level] - difficulty), level))


def _split(
    matrix: npt.NDArray[np.float64], sizes: npt.NDArray[np.float64], histogram: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Each level's samples divided among the stages in proportion to what stages of these sizes ask for."""
    asked = sizes[:, None] * matrix
    total = asked.sum(axis=0)
    scale: npt.NDArray[np.float64] = np.divide(histogram, total, out=np.zeros_like(histogram), where=total > 0)
    return asked * scale


def _round(column: npt.NDArray[np.float64], count: int) -> list[int]:
    whole = np.floor(column).astype(int)
    remainders = column - whole
    for index in sorted(range(len(column)), key=lambda index: (-remainders[index], index))[: count - int(whole.sum())]:
        whole[index] += 1
    return [int(value) for value in whole]
