"""The journal of a stage: whatever was cut off wherever, the finished result is the same bytes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from observe_r1.ladder.journal import BlockJournal


def record(block: int) -> list[dict[str, object]]:
    return [{"position": block, "text": f"ä\n{block}"}]


def complete(directory: Path, ranks: int = 1) -> bytes:
    journal = BlockJournal(directory, {"seed": 1}, 6)
    pending = journal.pending()
    for rank in range(ranks):
        writer = journal.writer(rank)
        for block in pending[rank::ranks] or pending[:1]:
            writer.write(block, record(block))
        writer.close()
    journal.finish()
    assert [entry["position"] for entry in journal.records()] == list(range(6))
    assert not list(directory.glob("rank*"))
    return journal.result.read_bytes()


@given(done=st.lists(st.integers(0, 5), unique=True), cut=st.integers(0, 400), ranks=st.integers(1, 4))
def test_cut_anywhere_and_continued_by_any_number_of_processes(done: list[int], cut: int, ranks: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        whole = complete(Path(directory) / "whole")
        journal = BlockJournal(Path(directory) / "cut", {"seed": 1}, 6)
        writer = journal.writer()
        for block in done:
            writer.write(block, record(block))
        writer.close()
        file = Path(directory) / "cut/rank0.jsonl"
        file.write_bytes(file.read_bytes()[:cut])
        assert set(journal.pending()) >= set(range(6)) - set(done)
        assert complete(Path(directory) / "cut", ranks) == whole


def test_an_unfinished_journal_cannot_be_closed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="lacks 2 of 2 blocks"):
        BlockJournal(tmp_path, {}, 2).finish()


def test_other_settings_are_named(tmp_path: Path) -> None:
    BlockJournal(tmp_path, {"seed": 1, "same": [1, 2]}, 2)
    with pytest.raises(ValueError, match=r"other settings \(seed was 1, now 2\)\. Delete it"):
        BlockJournal(tmp_path, {"seed": 2, "same": (1, 2)}, 2)


def test_nothing_to_do(tmp_path: Path) -> None:
    journal = BlockJournal(tmp_path, {}, 0)
    journal.finish()
    assert list(journal.records()) == []
