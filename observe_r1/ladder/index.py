"""Byte offsets of the samples of a tar shard, kept beside it as `SHARD.tar.idx`.

With them a sample is one seek and one read away, whatever tool wrote the tar. Members are grouped as webdataset groups
them: neighbours whose names agree up to the first dot.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, Literal

from webdataset.tariterators import base_plus_ext

logger = logging.getLogger(__name__)

FORMAT = "observe-r1 tar index"
FORMAT_VERSION = 1
SKIPPED_NAME = re.compile(r"__[^/]*__($|/)")  # webdataset's own default for members that are not data

Problem = Literal["shard_corrupt", "shard_truncated"]


@dataclass(frozen=True)
class SampleSpan:
    """Where a sample lies in its tar: from its first member's header to the padding of its last."""

    key: str
    offset: int  # bytes
    length: int  # bytes
    difficulty: float | None = None


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one tar."""

    tar_bytes: int
    headers: int  # CRC-32 of the first and last sample's first header: tells a tar from its rewrite of equal size
    spans: tuple[SampleSpan, ...]
    problem: Problem | None = None  # why samples after the last span are out of reach


def index_path(tar: Path) -> Path:
    """The index file of a tar."""
    return tar.with_name(f"{tar.name}.idx")


def open_index(tar: Path) -> ShardIndex:
    """The index of `tar`, built and saved beside it where it is missing or describes another state of the tar.

    Raises:
        FileNotFoundError: There is no such tar.
        ValueError: The file is not an uncompressed tar.
    """
    index = _load_index(tar)
    if index is None:
        index = build_index(tar)
        try:
            _save_index(tar, index)
        except OSError as error:
            logger.warning("%s cannot be kept (%s): the shard is scanned at every start", index_path(tar), error)
    return index


def build_index(tar: Path) -> ShardIndex:
    """The index of `tar`, from a pass over its headers and JSON members.

    Raises:
        FileNotFoundError: There is no such tar.
        ValueError: The file is not an uncompressed tar.
    """
    with tar.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        problem: list[Problem] = []
        members = _members(file, tar, size, problem)
        spans = []
        for key, group in groupby(members, key=lambda member: member.key):
            parts = list(group)
            first, last = parts[0], parts[-1]
            if last.end <= size:
                difficulty = next((part.difficulty for part in parts if part.difficulty is not None), None)
                spans.append(SampleSpan(key, first.offset, last.end - first.offset, difficulty))
        return ShardIndex(size, _header_checksum(file, spans), tuple(spans), problem[0] if problem else None)


@dataclass(frozen=True)
class _Member:
    key: str
    offset: int
    end: int
    difficulty: float | None


def _members(file: BinaryIO, tar: Path, size: int, problem: list[Problem]) -> Iterator[_Member]:
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
    except (ValueError, TypeError, LookupError, RecursionError):
        return None  # reading the sample will say what is wrong with it
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _header_checksum(file: BinaryIO, spans: list[SampleSpan]) -> int:
    checksum = 0
    for span in spans[:1] + spans[-1:]:
        file.seek(span.offset)
        checksum = zlib.crc32(file.read(tarfile.BLOCKSIZE), checksum)
    return checksum


def _save_index(tar: Path, index: ShardIndex) -> None:
    document = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "tar_bytes": index.tar_bytes,
        "headers": index.headers,
        "problem": index.problem,
        "samples": [astuple(span) for span in index.spans],
    }
    path = index_path(tar)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(document, file, separators=(",", ":"))
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would lock out the other users of a shared data set
        os.replace(temporary, path)  # several ranks may index the same shard at once
    except BaseException:
        os.unlink(temporary)
        raise


def _load_index(tar: Path) -> ShardIndex | None:
    """The index that lies beside `tar`, or None where there is none that fits."""
    try:
        document = json.loads(index_path(tar).read_bytes())
        if (document["format"], document["version"]) != (FORMAT, FORMAT_VERSION):
            return None
        spans = [SampleSpan(*values) for values in document["samples"]]
        index = ShardIndex(document["tar_bytes"], document["headers"], tuple(spans), document["problem"])
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        logger.warning("%s cannot be read (%s): the shard is scanned again", index_path(tar), error)
        return None
    with tar.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        current = size == index.tar_bytes and _header_checksum(file, spans) == index.headers
    return index if current else None
