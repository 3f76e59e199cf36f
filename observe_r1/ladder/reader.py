"""Reading a ladder: any sample by its position, for one read."""

from __future__ import annotations

import glob
import logging
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch.utils.data import Dataset

from observe_r1.experience import Prompt, Skipped
from observe_r1.ladder.images import DEFAULT_MAX_PIXELS, StoredImage, load_rgb
from observe_r1.ladder.index import SampleSpan, ShardIndex, open_index
from observe_r1.ladder.manifest import FILE_NAME, Manifest
from observe_r1.ladder.members import split_members
from observe_r1.ladder.sample import BadSample, Reason, Sample, parse_json, to_prompt
from observe_r1.ladder.shard_cache import ShardCache
from observe_r1.ladder.storage import Files, RemoteOptions, Unreachable, is_url, read_local

logger = logging.getLogger(__name__)

REMOTE_SHARDS_AT_ONCE = 16  # indexes that are fetched at the same time when a ladder is opened


@dataclass(frozen=True)
class _Shard:
    """A tar of the ladder, what its index says, and why samples that it should hold are out of reach."""

    tar: str
    index: ShardIndex | None
    announced: int  # positions that it takes
    problem: Reason | None = None


class LadderDataset(Dataset[Prompt | Skipped]):
    """The samples of a ladder by position. A bad sample is a `Skipped` in its place, so no position ever moves.

    For a `DataLoader`, pass `batch_size=None` or a `collate_fn`: prompts are not tensors. No file stays open between
    two samples, so workers may be forked or spawned. A sample takes 28 bytes of memory.

    Args:
        ladder: A directory with `ladder.json`, or tars from elsewhere that follow the same schema: a directory, one
            tar, a glob, or a list of tars, which is read in the order given (the others in alphabetical order). Each
            may be a URL.
        max_image_pixels: Largest width × height of an image, compared with its header before anything is decoded.
        missing_shards: What to do about a tar that `ladder.json` names and that is not there or cannot be reached:
            refuse the ladder (later, end the run), or return `Skipped` for each of its positions.
        remote: How what lies behind a URL is read.

    Attributes:
        problems: Shards by what is wrong with them: `shard_missing`, `shard_unreachable`, `shard_duplicate`,
            `shard_truncated` or `shard_corrupt`. The samples of such a shard that are out of reach are `Skipped` too.

    Raises:
        ValueError: The ladder has no shards, a shard is missing or no tar, or `ladder.json` belongs to other shards.
        Unreachable: The server of the ladder fails, refuses or does not answer.
    """

    def __init__(
        self,
        ladder: str | Path | Sequence[str | Path],
        *,
        max_image_pixels: int = DEFAULT_MAX_PIXELS,
        missing_shards: Literal["error", "skip"] = "error",
        remote: RemoteOptions | None = None,
    ) -> None:
        if missing_shards not in ("error", "skip"):
            raise ValueError(f"missing_shards is {missing_shards!r}; choose 'error' or 'skip'")
        self.problems: Counter[str] = Counter()
        self._max_image_pixels = max_image_pixels
        self._missing_shards = missing_shards
        self._files = Files(remote)
        tars = _tars(ladder, self._files)
        self._cache: ShardCache | None = None
        if self._files.remote.cache_directory is not None and any(is_url(tar) for tar, _ in tars):
            max_bytes = int(self._files.remote.cache_gigabytes * 1e9)
            self._cache = ShardCache(Path(self._files.remote.cache_directory), max_bytes, self._files)
        at_once = REMOTE_SHARDS_AT_ONCE if tars and is_url(tars[0][0]) else 1
        with ThreadPoolExecutor(at_once) as pool:
            shards = _without_duplicates(list(pool.map(lambda item: self._open(*item), tars)))
        self.problems.update(shard.problem for shard in shards if shard.problem is not None)
        self._tars = [shard.tar for shard in shards]
        self._tar_bytes = [0 if shard.index is None else shard.index.tar_bytes for shard in shards]
        self._reasons = [shard.problem for shard in shards]
        self._starts = np.cumsum([0, *(shard.announced for shard in shards)]).tolist()
        self._offsets = self._column(shards, "offsets", np.int64, 0)
        self._lengths = self._column(shards, "lengths", np.int64, 0)
        self._checksums = self._column(shards, "checksums", np.uint32, 0)
        self._difficulties = self._column(shards, "difficulties", np.float64, np.nan)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, position: int) -> Prompt | Skipped:
        """The prompt at `position`, or the reason why there is none.

        Raises:
            IndexError: The position is not one of 0 … len − 1.
            FileNotFoundError, Unreachable: Its shard has gone or does not answer, and `missing_shards` is `error`.
        """
        try:
            return to_prompt(self._decode(self.stored(position)), position)
        except BadSample as bad:
            return Skipped(position, bad.reason, f"{self._place(position)}: {bad.detail}")
        except (FileNotFoundError, Unreachable) as error:
            if self._missing_shards == "error":
                error.add_note(f"sample {position}; with data.missing_shards=skip a run goes on without such samples")
                raise
            reason = "shard_missing" if isinstance(error, FileNotFoundError) else "shard_unreachable"
            return Skipped(position, reason, str(error))

    def stored(self, position: int) -> dict[str, bytes]:
        """The sample as it is stored: its members by name, `json` first, then the images in order.

        Raises:
            BadSample: It is out of reach, or its bytes are not a sample, or not those that were indexed.
            FileNotFoundError, Unreachable: Its shard has gone or does not answer.
            IndexError: The position is not one of 0 … len − 1.
        """
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} of a ladder with {len(self)} samples")
        shard = bisect_right(self._starts, position) - 1
        offset, length = int(self._offsets[position]), int(self._lengths[position])
        reason = self._reasons[shard]
        if length == 0 and reason is not None:
            raise BadSample(reason, "out of reach since the ladder was opened")
        return split_members(self._content(shard, offset, length, int(self._checksums[position])))

    @property
    def difficulties(self) -> list[float | None]:
        """The difficulty at each position, from the index alone; None where it is unknown or out of reach."""
        return [None if difficulty != difficulty else difficulty for difficulty in self._difficulties.tolist()]

    @property
    def difficulty_array(self) -> npt.NDArray[np.float64]:
        """The same as an array, NaN where it is unknown or out of reach."""
        return self._difficulties

    @property
    def fingerprint(self) -> int:
        """Of the bytes of all samples in their order, from the indexes alone."""
        return zlib.crc32(self._checksums.tobytes())

    @property
    def stored_bytes(self) -> npt.NDArray[np.int64]:
        """What the sample at each position takes in its tar, from the index alone; 0 where it is out of reach."""
        return self._lengths

    def _open(self, tar: str, announced: int | None) -> _Shard:
        try:
            index = open_index(tar, self._files)
        except (FileNotFoundError, Unreachable) as error:
            missing = isinstance(error, FileNotFoundError)
            fault = f"{tar} is missing; restore the file" if missing else f"{error}; try again later"
            if announced is None or self._missing_shards == "error":
                skip = "" if announced is None else ", or set missing_shards to skip to train without its samples"
                raise ValueError(f"shard {fault}{skip}") from error
            logger.warning("shard %s: its %d samples are skipped", fault, announced)
            return _Shard(tar, None, announced, "shard_missing" if missing else "shard_unreachable")
        if index.problem is not None:
            logger.warning("%s: %s after sample %d; the rest of the shard is lost", tar, index.problem, len(index))
        if announced is not None and (len(index) > announced or (len(index) < announced and index.problem is None)):
            raise ValueError(
                f"{tar} holds {len(index)} samples, {FILE_NAME} says {announced}; they do not belong together: "
                "restore the shard, or build the ladder again"
            )
        return _Shard(tar, index, len(index) if announced is None else announced, index.problem)

    def _column(self, shards: Sequence[_Shard], name: str, dtype: npt.DTypeLike, missing: float) -> npt.NDArray[Any]:
        """An array of all indexes, position by position; `missing` where a sample is out of reach."""
        column = np.full(self._starts[-1], missing, dtype)
        for start, shard in zip(self._starts, shards, strict=False):
            if shard.index is not None:
                column[start : start + len(shard.index)] = getattr(shard.index, name)
        return column

    def _place(self, position: int) -> str:
        return f"{self._tars[bisect_right(self._starts, position) - 1]} at byte {self._offsets[position]}"

    def _content(self, shard: int, offset: int, length: int, checksum: int) -> bytes:
        tar, kept = self._tars[shard], None
        if self._cache is not None and is_url(tar):
            kept = self._cache.read(tar, self._tar_bytes[shard], offset, length)
            if kept is not None and zlib.crc32(kept) == checksum:
                return kept
        content = _checked(self._files.read(tar, offset, length), length, checksum)
        if kept is not None and self._cache is not None:  # the server's bytes are right, so those on the disk are not
            logger.warning("the copy of %s in %s is damaged and is fetched again", tar, self._cache.directory)
            self._cache.discard(tar, self._tar_bytes[shard])
        return content

    def _decode(self, members: dict[str, bytes]) -> Sample[Image.Image]:
        document = parse_json(members.pop("json"))
        images = [load_rgb(name, data, self._max_image_pixels) for name, data in members.items()]
        return Sample.from_document(document, images)


def read_members(tar: str | Path, span: SampleSpan) -> dict[str, bytes]:
    """The bytes of a sample's members, `json` first, then the images in order. Nothing else of the tar is read.

    Raises:
        BadSample: The bytes are not those that were indexed, or not a sample with a JSON member and images numbered
            from 0.
    """
    return split_members(_checked(read_local(tar, span.offset, span.length), span.length, span.checksum))


def read_stored(tar: str | Path, span: SampleSpan) -> Sample[StoredImage]:
    """A sample of a local tar with its images as they are stored, for writing it elsewhere.

    Raises:
        BadSample: The sample does not follow the schema.
    """
    members = read_members(tar, span)
    document = parse_json(members.pop("json"))
    return Sample.from_document(
        document, [StoredImage(data, name.rpartition(".")[2]) for name, data in members.items()]
    )


def _checked(content: bytes, length: int, checksum: int) -> bytes:
    if len(content) < length:
        raise BadSample("shard_truncated", f"the shard ends after {len(content)} of {length} bytes")
    if zlib.crc32(content) != checksum:
        raise BadSample(
            "shard_changed", "not the bytes that were indexed; if the shard was changed on purpose, delete its index"
        )
    return content


def _without_duplicates(shards: Sequence[_Shard]) -> list[_Shard]:
    """The shards, those left empty that hold the same bytes as an earlier one."""
    first: dict[tuple[int, bytes], int] = {}
    kept = []
    for number, shard in enumerate(shards):
        if shard.index is not None and len(shard.index):
            other = first.setdefault((shard.index.tar_bytes, shard.index.checksums.tobytes()), number)
            if other != number:
                logger.warning("%s holds what %s holds: its samples are skipped", shard.tar, shards[other].tar)
                shard = _Shard(shard.tar, None, shard.announced, "shard_duplicate")
        kept.append(shard)
    return kept


def _no_shards(ladder: str) -> str:
    why = ""
    if not is_url(ladder) and not glob.has_magic(ladder):
        if not Path(ladder).exists():
            why = f" (there is no such path in {Path.cwd()})"
        elif Path(ladder).is_file():
            why = f" (it is no tar; `observe-r1 ladder import {ladder} DIRECTORY` makes a ladder of rows)"
    return f"{ladder} holds no shards{why}; give a directory with {FILE_NAME}, or tars by name or glob"


def _tars(ladder: str | Path | Sequence[str | Path], files: Files) -> list[tuple[str, int | None]]:
    """The tars of a ladder in order, each with the number of samples its manifest announces."""
    if not isinstance(ladder, (str, Path)):
        tars = [str(tar) for tar in ladder]
    else:
        address = str(ladder)
        folder = address.rstrip("/")
        if address.partition("?")[0].endswith(".tar") and not glob.has_magic(address.partition("?")[0]):
            tars = [address]
        elif glob.has_magic(address):
            tars = files.glob(address)
        else:
            try:
                manifest = Manifest.parse(files.read_all(f"{folder}/{FILE_NAME}"), f"{folder}/{FILE_NAME}")
                return [(f"{folder}/{shard.file}", shard.samples) for shard in manifest.shards]
            except (FileNotFoundError, NotADirectoryError):
                tars = files.glob(f"{folder if is_url(folder) else glob.escape(folder)}/*.tar")
    if not tars:
        raise ValueError(_no_shards(str(ladder)))
    return [(tar, None) for tar in tars]
