"""What a long computation over numbered blocks has finished, on disk, so that a killed one continues where it was.

Every finished block is one line. A line that a kill cut short does not count: its block is computed again. When all
blocks are there they are brought into order, so that the result is the same bytes however often it was interrupted and
however many processes wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULT = "blocks.jsonl"
SETTINGS = "settings.json"


class BlockJournal:
    """The journal of one stage.

    Args:
        directory: Of the stage; made if it is not there.
        settings: What the result depends on, as JSON. A journal of other settings is refused.
        n_blocks: Blocks, numbered from 0.

    Raises:
        ValueError: The directory holds the journal of other settings.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any], n_blocks: int) -> None:
        self.directory = directory
        self.n_blocks = n_blocks
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / SETTINGS
        wanted = json.loads(json.dumps(settings))
        if path.is_file():
            _check(directory, json.loads(path.read_bytes()), wanted)
        else:
            replace_text(path, json.dumps(wanted, indent=1, sort_keys=True) + "\n")

    @property
    def is_finished(self) -> bool:
        return self.result.is_file()

    @property
    def result(self) -> Path:
        """All blocks in order, once they are there."""
        return self.directory / RESULT

    def pending(self) -> list[int]:
        """The blocks that are not finished."""
        if self.is_finished:
            return []
        done = {block for _, _, block in self._lines()}
        return [block for block in range(self.n_blocks) if block not in done]

    def writer(self, rank: int = 0) -> BlockWriter:
        """Appends to the file of one process."""
        return BlockWriter(self.directory / f"rank{rank}.jsonl")

    def finish(self) -> None:
        """Brings the blocks of all processes into order. To be called by one process, when no other writes.

        Raises:
            RuntimeError: Blocks are missing.
        """
        if not self.is_finished:
            if missing := self.pending():
                raise RuntimeError(f"{self.directory} lacks {len(missing)} of {self.n_blocks} blocks")
            where = {block: (path, offset) for path, offset, block in self._lines()}
            unfinished = self.directory / f".{RESULT}"
            with unfinished.open("wb") as result:
                for block in range(self.n_blocks):
                    path, offset = where[block]
                    with path.open("rb") as file:
                        file.seek(offset)
                        result.write(file.readline())
            unfinished.replace(self.result)
        for path in self.directory.glob("rank*.jsonl"):
            path.unlink()

    def records(self) -> Iterator[dict[str, Any]]:
        """The records of all blocks in order."""
        with self.result.open("rb") as file:
            for line in file:
                yield from json.loads(line)["records"]

    def _lines(self) -> Iterator[tuple[Path, int, int]]:
        """(file, offset, block) of every whole line."""
        for path in sorted(self.directory.glob("rank*.jsonl")):
            with path.open("rb") as file:
                offset = 0
                for line in file:
                    if line.endswith(b"\n"):
                        yield path, offset, json.loads(line)["block"]
                    offset += len(line)


class BlockWriter:
    """Writes blocks behind the whole lines of a file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab+")
        self._file.seek(0)
        whole = sum(len(line) for line in self._file if line.endswith(b"\n"))
        self._file.truncate(whole)

    def write(self, block: int, records: Sequence[Mapping[str, Any]]) -> None:
        line = json.dumps({"block": block, "records": records}, ensure_ascii=False) + "\n"
        self._file.write(line.encode("utf-8", "surrogatepass"))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def replace_text(path: Path, text: str) -> None:
    """Write a file as a whole or not at all."""
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def _check(directory: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    changed = [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]
    if changed:
        what = "; ".join(f"{name} was {found.get(name)!r:.200}, now {wanted.get(name)!r:.200}" for name in changed)
        raise ValueError(
            f"{directory} was computed with other settings ({what}). Delete it to compute it again, restore the "
            "settings, or name another directory for the work"
        )
