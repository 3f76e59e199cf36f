"""`ladder.json`: which shards make up a ladder, what they hold and how they were built."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

FILE_NAME = "ladder.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Shard:
    """One tar file of a ladder."""

    file: str  # name, relative to the directory of ladder.json
    samples: int
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path, samples: int) -> Shard:
        """The entry of the shard at `path`, which holds `samples` samples."""
        return cls(path.name, samples, path.stat().st_size, _sha256(path))


@dataclass(frozen=True)
class Manifest:
    """What `ladder.json` says."""

    shards: tuple[Shard, ...]
    levels: Mapping[str, int] = field(default_factory=dict)  # difficulty, or "unknown" → number of samples
    built: Mapping[str, Any] = field(default_factory=dict)  # how the ladder was made; free form

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    def save(self, directory: Path) -> None:
        document = {"format_version": FORMAT_VERSION, "samples": self.samples, **asdict(self)}
        text = json.dumps(document, indent=1, ensure_ascii=False, sort_keys=True)
        (directory / FILE_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """The manifest of the ladder in `directory`.

        Raises:
            ValueError: There is none, it cannot be read, or it has another format version.
        """
        path = directory / FILE_NAME
        try:
            return cls.parse(path.read_bytes(), str(path))
        except FileNotFoundError:
            raise ValueError(f"{directory} has no {FILE_NAME}; build or import a ladder there") from None

    @classmethod
    def parse(cls, content: bytes, address: str) -> Manifest:
        """The manifest with this content, read from `address`.

        Raises:
            ValueError: It cannot be read, it has another format version, or names a shard outside of its directory.
        """
        try:
            document = json.loads(content)
            version = document["format_version"]
            if version != FORMAT_VERSION:
                raise ValueError(f"format version {version!r}, this release reads {FORMAT_VERSION}")
            shards = tuple(Shard(**shard) for shard in document["shards"])
            for shard in shards:
                place = PurePosixPath(shard.file)
                if place.is_absolute() or ".." in place.parts or "://" in shard.file:
                    raise ValueError(f"shard {shard.file!r} lies outside of the ladder's directory")
            return cls(shards, document["levels"], document["built"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{address} is not a usable ladder manifest ({error}); build the ladder again") from error

    def verify(self, directory: Path) -> list[str]:
        """The shards under `directory` that are missing or differ from their recorded size or checksum."""
        return [
            shard.file
            for shard in self.shards
            if not (path := directory / shard.file).is_file() or Shard.of(path, shard.samples) != shard
        ]


def level_name(difficulty: float | None) -> str:
    """The key of a difficulty in the histogram of levels."""
    return "unknown" if difficulty is None else f"{difficulty:.4g}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
