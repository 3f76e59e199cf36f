"""The rows of a data set on disk, one after the other: JSON, JSON Lines, parquet, or a folder of such files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from observe_r1.ladder.sample import BadSample, parse_json

if TYPE_CHECKING:
    from pyarrow import RecordBatch

SUFFIXES = (".jsonl", ".json", ".parquet")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
PARQUET_ROWS = 64  # of a record batch: rows may hold pictures


@dataclass(frozen=True)
class Row:
    """One row of a table: a JSON value, or the `BadSample` that says why it is none."""

    file: Path
    number: int  # from 1; in JSON Lines the number of the line
    content: Any
    default_id: str  # after the file, as it is called below the input, and the number


def read_rows(input: Path) -> Iterator[Row]:
    """Every row of a file, or of the tables in a folder in alphabetical order. A few rows are in memory at a time.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: The folder has no tables, a file is neither JSON nor parquet or damaged, or pyarrow is missing.
    """
    for file in find_tables(input):
        rows = read_parquet(file) if file.suffix == ".parquet" else _read_json_file(file)
        name = file.relative_to(input) if file != input else Path(file.name)
        for number, content in rows:
            yield Row(file, number, content, f"{name.with_suffix('').as_posix()}-{number}")


def find_tables(input: Path) -> list[Path]:
    """The table files of a data set: itself, or in a folder those at the top, else those further down.

    Raises:
        ValueError: A folder without any.
    """
    if not input.is_dir():
        return [input]
    files = [path for path in sorted(input.rglob("*")) if path.suffix in SUFFIXES and path.is_file()]
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(input).parts)]
    at_top = [path for path in files if path.parent == input]
    found = at_top or files
    # a data set of parquet or JSON Lines often brings a JSON file about itself
    tables = [path for path in found if path.suffix != ".json"] or found
    if not tables:
        raise ValueError(f"{input} holds no table; put a file that ends in {', '.join(SUFFIXES)} into it")
    return tables


def read_json(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """The rows of a JSON list or of JSON Lines, numbered from 1 (JSON Lines: the line's number).

    A line that is not JSON comes as the `BadSample` that says so.

    Raises:
        ValueError: The file holds a JSON list that cannot be parsed to its end.
    """
    if _is_list(file):
        yield from _read_list(file)
        return
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                yield number, parse_json(line)
            except BadSample as bad:
                yield number, bad


def read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    """The rows of a parquet file, numbered from 1.

    Raises:
        ValueError: The file is not parquet, or pyarrow is missing.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError(f"{path} needs pyarrow: pip install 'observe-r1[parquet]'") from error
    try:
        # buffered: by default a whole column of a row group is read, which can be gigabytes of pictures
        with parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
            batches = file.iter_batches(batch_size=PARQUET_ROWS)
            yield from enumerate((row for batch in batches for row in _rows_of(batch)), start=1)
    except (ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the file system, not of pyarrow
            raise
        raise ValueError(f"{path} cannot be read as parquet ({error}); download it again") from error


def _rows_of(batch: RecordBatch) -> list[Any]:
    try:
        rows: list[Any] = batch.to_pylist()
    except UnicodeDecodeError:  # of one row among them
        rows = [_row_of(batch.slice(number, 1)) for number in range(batch.num_rows)]
    return rows


def _row_of(batch: RecordBatch) -> Any:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return BadSample("field_invalid", f"a text is not UTF-8: {error}")


def _read_json_file(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        yield from read_json(file)


def _is_list(file: BinaryIO) -> bool:
    """Whether the first character that is not white space is `[`; leaves the file where the parser starts."""
    start = len(BYTE_ORDER_MARK) if file.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK else 0
    file.seek(start)
    first = b""
    while not first and (byte := file.read(1)):
        first = byte.strip()
    file.seek(start)
    return first == b"["


def _read_list(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    import ijson

    number = 0
    try:
        for number, row in enumerate(ijson.items(file, "item", use_float=True), start=1):
            yield number, row
    except ijson.JSONError as error:
        raise ValueError(
            f"the input starts as a JSON list but cannot be parsed after row {number} ({error}); repair the file, or "
            "write one JSON object per line, where a bad line costs one row"
        ) from error
