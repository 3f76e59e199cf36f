"""Samples on disk between reading and ordering: an order can only be known after the last row.

What the order depends on lies in a table of SQLite, so that a million rows take no more memory than a thousand.
"""

from __future__ import annotations

import json
import math
import sqlite3
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from observe_r1.answers import Gold
from observe_r1.ladder.images import StoredImage
from observe_r1.ladder.index import SampleSpan, open_index
from observe_r1.ladder.reader import read_stored
from observe_r1.ladder.sample import BadSample, Sample

_TABLE = """
CREATE TABLE samples (
    number INTEGER PRIMARY KEY, id TEXT UNIQUE, file TEXT, row INTEGER, gold TEXT, difficulty REAL, complexity REAL,
    refused INTEGER DEFAULT 0, tar TEXT, key TEXT, offset INTEGER, length INTEGER,
    checksum INTEGER
)
"""


class Staging:
    """The staged samples, by their number in the order of the input.

    Args:
        directory: Where they lie; the caller removes it.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.directory = directory
        self._database = sqlite3.connect(directory / "samples.sqlite", isolation_level=None)
        self._database.execute("PRAGMA journal_mode=OFF")  # lost with the directory anyway
        self._database.execute("PRAGMA synchronous=OFF")
        self._database.execute(_TABLE)
        self._database.execute("BEGIN")

    def close(self) -> None:
        self._database.close()

    def add(self, file: Path, row: int, sample: Sample[StoredImage]) -> None:
        """Notes a sample that is about to be written to the shards of the directory.

        Raises:
            BadSample: `id_duplicate`.
        """
        gold = json.dumps(asdict(sample.gold))
        values = (sample.id, str(file), row, gold, sample.difficulty, sample.complexity)
        try:
            self._database.execute(
                "INSERT INTO samples (id, file, row, gold, difficulty, complexity) VALUES (?, ?, ?, ?, ?, ?)", values
            )
        except sqlite3.IntegrityError:
            raise BadSample("id_duplicate", sample.id) from None

    def locate(self, tars: Sequence[Path]) -> None:
        """Notes where the samples lie in the shards they were written to."""
        number = 0
        for tar in tars:
            for span in open_index(tar).spans:
                number += 1
                self._database.execute(
                    "UPDATE samples SET tar = ?, key = ?, offset = ?, length = ?, checksum = ? WHERE number = ?",
                    (str(tar), span.key, span.offset, span.length, span.checksum, number),
                )

    def golds(self, count: int) -> Iterator[list[tuple[int, Path, int, Gold]]]:
        """(number, file, row, gold) of all samples, in batches of `count`."""
        cursor = self._database.execute("SELECT number, file, row, gold FROM samples ORDER BY number")
        while batch := cursor.fetchmany(count):
            yield [(number, Path(file), row, _gold(gold)) for number, file, row, gold in batch]

    def refuse(self, number: int) -> None:
        """Leaves a sample out of everything that follows."""
        self._database.execute("UPDATE samples SET refused = 1 WHERE number = ?", (number,))

    def without_difficulty(self) -> list[tuple[int, Path, int, str]]:
        """(number, file, row, id) of usable samples of unknown difficulty."""
        cursor = self._database.execute(
            "SELECT number, file, row, id FROM samples WHERE NOT refused AND difficulty IS NULL ORDER BY number"
        )
        return [(number, Path(file), row, id) for number, file, row, id in cursor]

    @property
    def has_difficulties(self) -> bool:
        query = "SELECT 1 FROM samples WHERE NOT refused AND difficulty IS NOT NULL LIMIT 1"
        return self._database.execute(query).fetchone() is not None

    def in_order_of_input(self) -> Sequence[int]:
        """The numbers of the usable samples."""
        return self._numbers("number")

    def from_easy_to_hard(self) -> Sequence[int]:
        """The numbers of the usable samples by (difficulty, complexity, id)."""
        return self._numbers("difficulty, complexity IS NULL, complexity, id")

    def difficulties(self) -> Sequence[float]:
        """The difficulty of every sample, by its number; NaN where it is unknown."""
        values = array("d", [math.nan])  # numbers start at 1
        for (difficulty,) in self._database.execute("SELECT difficulty FROM samples ORDER BY number"):
            values.append(math.nan if difficulty is None else difficulty)
        return values

    def _numbers(self, order: str) -> Sequence[int]:
        # an array: a list of a million numbers takes five times as much
        cursor = self._database.execute(f"SELECT number FROM samples WHERE NOT refused ORDER BY {order}")
        return array("q", (number for (number,) in cursor))

    def read(self, number: int) -> Sample[StoredImage]:
        """A staged sample."""
        tar, *span = self._database.execute(
            "SELECT tar, key, offset, length, checksum FROM samples WHERE number = ?", (number,)
        ).fetchone()
        return read_stored(Path(tar), SampleSpan(*span))


def _gold(text: str) -> Gold:
    values = json.loads(text)
    return Gold(**{**values, "choices": tuple(values["choices"])})
