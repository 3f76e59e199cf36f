"""Byte offsets of the samples of a tar shard, kept beside it as `SHARD.tar.idx`.

With them a sample is one read away, whatever tool wrote the tar. Members are grouped as webdataset groups them:
neighbours whose names agree up to the first dot. Every sample has a checksum, so that one which was damaged or replaced
later is noticed when it is read.

The file is a line of JSON (format, size of the tar, number of samples, …) and, after it, one little-endian array after
the other: offsets, lengths, checksums, difficulties; at the end the keys, separated by zero bytes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
from webdataset.tariterators import base_plus_ext

from observe_r1.ladder.members import SKIPPED_NAME
from observe_r1.ladder.storage import Files, is_url

logger = logging.getLogger(__name__)

FORMAT = "observe-r1 tar index"
FORMAT_VERSION = 2
ARRAYS = (("offsets", "<i8"), ("lengths", "<i8"), ("checksums", "<u4"), ("difficulties", "<f8"))
CHUNK_BYTES = 1024 * 1024

Problem = Literal["shard_corrupt", "shard_truncated"]


@dataclass(frozen=True)
class SampleSpan:
    """Where a sample lies in its tar: from its first member's header to the padding of its last."""

    key: str
    offset: int  # bytes
    length: int  # bytes
    checksum: int  # CRC-32 of these bytes
    difficulty: float | None = None


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The samples of one tar, as arrays: a ladder has millions of them."""

    tar_bytes: int
    headers: int  # CRC-32 of the first and last sample's first header: tells a tar from its rewrite of equal size
    offsets: npt.NDArray[np.int64]  # bytes
    lengths: npt.NDArray[np.int64]  # bytes
    checksums: npt.NDArray[np.uint32]  # CRC-32 of each sample's bytes
    difficulties: npt.NDArray[np.float64]  # NaN where unknown
    key_bytes: bytes  # separated by zero bytes
    problem: Problem | None = None  # why samples after the last one are out of reach

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def spans(self) -> tuple[SampleSpan, ...]:
        """The samples one by one."""
        keys = self.key_bytes.decode(errors="surrogateescape").split("\0") if len(self) else []
        columns = (self.offsets.tolist(), self.lengths.tolist(), self.checksums.tolist(), self.difficulties.tolist())
        return tuple(
            SampleSpan(key, offset, length, checksum, None if difficulty != difficulty else difficulty)
            for key, offset, length, checksum, difficulty in zip(keys, *columns, strict=True)
        )


def index_path(tar: Path) -> Path:
    """The index file of a local tar."""
    return tar.with_name(f"{tar.name}.idx")


def open_index(tar: str | Path, files: Files | None = None) -> ShardIndex:
    """The index of `tar`, built where it is missing or describes another state of the tar.

    It is saved beside a local tar; that of a remote one, in the directory of the cache where there is one.

    Raises:
        FileNotFoundError: There is no such tar.
        Unreachable: The tar, or an index beside it, may be there and could not be read.
        ValueError: The file is not an uncompressed tar.
    """
    address, files = str(tar), files or Files()
    places = [f"{address}.idx"]
    cache = files.remote.cache_directory
    if is_url(address) and cache is not None:
        places.insert(0, str(Path(cache) / "index" / f"{hashlib.sha256(address.encode()).hexdigest()[:32]}.idx"))
    for place in places:
        index = _load_index(place, files)
        if index is not None and _describes(index, address, files):
            return index
    if is_url(address):
        logger.warning("%s has no index beside it and is read from end to end, once", address)
    index = build_index(address, files)
    if is_url(places[0]):
        logger.warning("set remote.cache_directory, or %s is read from end to end at every start", address)
    else:
        try:
            _save_index(Path(places[0]), index)
        except OSError as error:
            logger.warning("%s cannot be kept (%s): the shard is scanned at every start", places[0], error)
    return index


def build_index(tar: str | Path, files: Files | None = None) -> ShardIndex:
    """The index of `tar`, from one pass over it.

    Raises:
        FileNotFoundError: There is no such tar.
        Unreachable: The tar may be there and could not be read.
        ValueError: The file is not an uncompressed tar.
    """
    address, files = str(tar), files or Files()
    with files.open(address) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        problem: list[Problem] = []
        keys, rows = [], []
        for key, group in groupby(_members(file, address, size, problem), key=lambda member: member.key):
            parts = list(group)
            offset, end = parts[0].offset, parts[-1].end
            if end <= size:
                difficulty = next((part.difficulty for part in parts if part.difficulty is not None), np.nan)
                keys.append(key)
                rows.append((offset, end - offset, _checksum(file, offset, end - offset), difficulty))
    columns = zip(*rows, strict=True) if rows else [()] * len(ARRAYS)
    arrays = {name: np.array(column, dtype) for column, (name, dtype) in zip(columns, ARRAYS, strict=True)}
    key_bytes = "\0".join(keys).encode(errors="surrogateescape")
    headers = _header_checksum(address, files, arrays["offsets"])
    return ShardIndex(size, headers, **arrays, key_bytes=key_bytes, problem=problem[0] if problem else None)


@dataclass(frozen=True)
class _Member:
    key: str
    offset: int
    end: int
    difficulty: float | None


def _members(file: BinaryIO, tar: str, size: int, problem: list[Problem]) -> Iterator[_Member]:
    """The members that webdataset would read, in order; appends to `problem` if the tar does not end as it should."""
    if size < tarfile.BLOCKSIZE:
        problem.append("shard_truncated")
        return
    try:
        archive = tarfile.TarFile(fileobj=file)
    except tarfile.ReadError as error:
        raise ValueError(
            f"{tar} is not an uncompressed tar ({error}); unpack a compressed shard, download a damaged one again"
        ) from error
    with archive:
        end = 0
        while True:
            try:
                member = archive.next()
            except tarfile.ReadError:  # the data of the last member, or the header it announced, is cut off
                problem.append("shard_truncated")
                return
            if member is None:
                break
            archive.members = []  # type: ignore[attr-defined]  # a long shard would otherwise be held in memory, header by header
            end = archive.offset  # where the next header is due
            if end <= member.offset:  # a negative size, which would lead back to the same header for ever
                problem.append("shard_corrupt")
                return
            if not member.isreg() or member.issparse() or SKIPPED_NAME.match(member.name):
                continue
            key, suffix = base_plus_ext(member.name)
            if key is None:
                continue
            difficulty = None
            if suffix.lower() == "json" and end <= size:
                content = archive.extractfile(member)
                assert content is not None  # a regular file has content
                difficulty = _difficulty(content.read())
            yield _Member(key, member.offset, end, difficulty)
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE:
            problem.append("shard_truncated")
        elif block.strip(b"\0"):
            problem.append("shard_corrupt")


def _difficulty(document: bytes) -> float | None:
    try:
        value = json.loads(document)["difficulty"]
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
    except (ValueError, TypeError, LookupError, RecursionError, OverflowError):
        return None  # reading the sample will say what is wrong with it


def _checksum(file: BinaryIO, offset: int, length: int) -> int:
    checksum = 0
    file.seek(offset)
    for start in range(0, length, CHUNK_BYTES):
        checksum = zlib.crc32(file.read(min(CHUNK_BYTES, length - start)), checksum)
    return checksum


def _header_checksum(tar: str, files: Files, offsets: npt.NDArray[np.int64]) -> int:
    checksum = 0
    for offset in offsets[[0, -1]].tolist() if len(offsets) else []:
        checksum = zlib.crc32(files.read(tar, offset, tarfile.BLOCKSIZE), checksum)
    return checksum


def _describes(index: ShardIndex, tar: str, files: Files) -> bool:
    return files.size(tar) == index.tar_bytes and _header_checksum(tar, files, index.offsets) == index.headers


def _save_index(path: Path, index: ShardIndex) -> None:
    arrays = [np.ascontiguousarray(getattr(index, name), dtype).tobytes() for name, dtype in ARRAYS]
    body = b"".join([*arrays, index.key_bytes])
    description: dict[str, Any] = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "tar_bytes": index.tar_bytes,
        "headers": index.headers,
        "problem": index.problem,
        "samples": len(index),
        "arrays": ARRAYS,
        "checksum": zlib.crc32(body),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(json.dumps(description, separators=(",", ":")).encode() + b"\n" + body)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would lock out the other users of a shared data set
        os.replace(temporary, path)  # several ranks may index the same shard at once
    except BaseException:
        os.unlink(temporary)
        raise


def _load_index(place: str, files: Files) -> ShardIndex | None:
    """The index that is kept at `place`, or None where there is none that can be used."""
    try:
        line, _, body = files.read_all(place).partition(b"\n")
        description = json.loads(line)
        if (description["format"], description["version"]) != (FORMAT, FORMAT_VERSION):
            return None
        if zlib.crc32(body) != description["checksum"]:
            raise ValueError("its checksum is wrong")
        values: dict[str, Any] = {name: description[name] for name in ("tar_bytes", "headers", "problem")}
        start = 0
        for name, dtype in ARRAYS:
            values[name] = np.frombuffer(body, dtype, description["samples"], start)
            start += values[name].nbytes
        return ShardIndex(**values, key_bytes=body[start:])
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        logger.warning("%s cannot be read (%s): the shard is scanned again", place, error)
        return None
