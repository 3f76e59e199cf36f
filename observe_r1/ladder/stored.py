"""The samples of ladders as their shards store them, for what reads a ladder without training on it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from observe_r1.ladder.images import StoredImage
from observe_r1.ladder.index import SampleSpan, open_index
from observe_r1.ladder.manifest import FILE_NAME, Manifest
from observe_r1.ladder.reader import read_stored
from observe_r1.ladder.sample import BadSample, Sample

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # a Path has lost one of the slashes; one letter is a drive


class StoredLadder:
    """The samples of one or several local ladders by position, images encoded as they are stored.

    Args:
        directories: With `ladder.json`, or with tars that follow its schema. The samples of several are named after
            their directory too, `NAME/ID`.

    Attributes:
        tars: The shards in order.
        problems: Shards by what is wrong with them.

    Raises:
        ValueError: A directory is a URL or holds no shards, a shard that its `ladder.json` names is missing, or two
            directories have the same name.
    """

    def __init__(self, directories: Sequence[Path]) -> None:
        names = [directory.name for directory in directories]
        if len(set(names)) < len(names):
            raise ValueError(f"the ladders {', '.join(map(str, directories))} share a name: rename one of them")
        self.tars = [tar for directory in directories for tar in _tars(directory)]
        self._prefix = len(directories) > 1
        self.problems: Counter[str] = Counter()
        self._spans: list[tuple[int, SampleSpan]] = []
        for number, tar in enumerate(self.tars):
            index = open_index(tar)
            if index.problem is not None:
                self.problems[index.problem] += 1
            self._spans += [(number, span) for span in index.spans]

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, position: int) -> Sample[StoredImage]:
        """The sample at a position.

        Raises:
            BadSample: It does not follow the schema.
        """
        number, span = self._spans[position]
        tar = self.tars[number]
        sample = read_stored(tar, span)
        return replace(sample, id=f"{tar.parent.name}/{sample.id}") if self._prefix else sample

    def shard_of(self, position: int) -> Path:
        """The tar of a position, below the directory that holds its ladder."""
        tar = self.tars[self._spans[position][0]]
        return Path(tar.parent.name, tar.name)

    def samples(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Sample[StoredImage] | BadSample]]:
        """Every position of a range, with its sample or what is wrong with it."""
        for position in range(start, min(len(self) if stop is None else stop, len(self))):
            try:
                yield position, self[position]
            except BadSample as bad:
                yield position, bad


def _tars(directory: Path) -> list[Path]:
    if URL.match(str(directory)) and not directory.exists():
        raise ValueError(
            f"{directory} is a URL, which only training reads: copy the ladder to a local disk and give its directory"
        )
    if (directory / FILE_NAME).is_file():
        tars = [directory / shard.file for shard in Manifest.load(directory).shards]
        if missing := [tar for tar in tars if not tar.is_file()]:
            raise ValueError(f"shard {missing[0]} is missing; restore the file")
        return tars
    tars = sorted(directory.glob("*.tar"))
    if not tars:
        raise ValueError(f"{directory} holds no shards; give a directory with {FILE_NAME} or with tars")
    return tars


def question_of(sample: Sample[StoredImage]) -> str:
    """What the user is asked, without the system's words."""
    texts = []
    for message in sample.messages:
        if message["role"] == "user":
            content = message["content"]
            items = [{"type": "text", "text": content}] if isinstance(content, str) else content
            texts += [item["text"] for item in items if item["type"] == "text"]
    return "\n".join(texts)
