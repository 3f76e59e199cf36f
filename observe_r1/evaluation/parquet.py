"""Rows of published data sets: parquet files in a directory, or on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Any


def locate_parquet(source: str, split: str) -> list[Path]:
    """The parquet files of a split, in the order of their paths.

    Args:
        source: A file, a directory (searched with all its folders), a glob, or a data set on the hub such as
            `AI4Math/MathVista`, which is downloaded into the hub's cache.
        split: Files are named `SPLIT-00000-of-00001.parquet`, as the hub names them. A single file and the files of a
            glob may have any name.

    Raises:
        ValueError: Nothing is found, or the hub cannot be reached.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(path.rglob(f"{split}-*.parquet"))
        if not found:
            raise ValueError(f"{source!r} holds no file {split}-*.parquet, the name under which the hub stores a split")
        return found
    if has_magic(source):
        found = sorted(Path(name) for name in glob(str(path), recursive=True))
        if not found:
            raise ValueError(f"no file matches {source!r}")
        return found
    if source.startswith((".", "/", "~")) or source.count("/") != 1 or source.endswith(".parquet"):
        raise ValueError(f"no file or directory {source!r}; give parquet files or a data set on the hub (OWNER/NAME)")
    return _download(source, split)


def _download(repository: str, split: str) -> list[Path]:
    from huggingface_hub import snapshot_download

    try:
        directory = snapshot_download(repository, repo_type="dataset", allow_patterns=[f"*{split}-*.parquet"])
    except Exception as error:  # whatever network, hub or disk raise
        raise ValueError(
            f"there is no directory {repository!r}, and the data set of this name cannot be fetched from the hub "
            f"({type(error).__name__}: {error}). Without network, download its parquet files and give their directory."
        ) from error
    found = sorted(Path(directory).rglob(f"{split}-*.parquet"))
    if not found:
        raise ValueError(f"the data set {repository!r} has no parquet file of a split {split!r}")
    return found


class ParquetTable:
    """The rows of several parquet files with the same columns, read one row group at a time.

    Pictures stay in the files until their row is asked for; the row group read last is kept.

    Raises:
        ValueError: A file cannot be read, lacks a required column, or pyarrow is not installed.
    """

    def __init__(self, files: Sequence[Path], required: Sequence[str]) -> None:
        try:
            from pyarrow import ArrowException
            from pyarrow.parquet import ParquetFile
        except ImportError as error:
            raise ValueError("Benchmarks from parquet files need pyarrow: pip install 'observe-r1[eval]'.") from error
        self._files: list[Any] = []
        self._groups: list[tuple[int, int, int]] = []  # file, row group, position of its first row
        self._read: tuple[int, tuple[str, ...], list[dict[str, Any]]] | None = None
        self._rows = 0
        for path in files:
            try:
                file = ParquetFile(path)
            except (ArrowException, OSError) as error:
                raise ValueError(f"{path} is no parquet file that can be read: {error}") from error
            columns = file.schema_arrow.names
            if missing := [name for name in required if name not in columns]:
                raise ValueError(f"{path} has no column {', '.join(missing)}; its columns are {', '.join(columns)}")
            for group in range(file.num_row_groups):
                self._groups.append((len(self._files), group, self._rows))
                self._rows += file.metadata.row_group(group).num_rows
            self._files.append(file)

    def __len__(self) -> int:
        return self._rows

    def columns(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """All rows with the named columns; a column that a file does not have is None."""
        return [row for group in range(len(self._groups)) for row in self._load(group, names)]

    def row(self, position: int, names: Sequence[str]) -> dict[str, Any]:
        """One row with the named columns; a column that its file does not have is None."""
        number = max(n for n, (_, _, first) in enumerate(self._groups) if first <= position)
        if self._read is None or self._read[:2] != (number, tuple(names)):
            self._read = (number, tuple(names), self._load(number, names))
        return self._read[2][position - self._groups[number][2]]

    def _load(self, number: int, names: Sequence[str]) -> list[dict[str, Any]]:
        file, group, _ = self._groups[number]
        present = [name for name in names if name in self._files[file].schema_arrow.names]
        rows = self._files[file].read_row_group(group, columns=present).to_pylist()
        return [{name: row.get(name) for name in names} for row in rows]
