"""Reading a ladder: any sample by its position, for one seek and one read."""

from __future__ import annotations

import glob
import io
import logging
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from torch.utils.data import Dataset
from webdataset.autodecode import Decoder, DecodingError, imagehandler
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_iterator

from observe_r1.experience import Prompt, Skipped
from observe_r1.ladder.images import DEFAULT_MAX_PIXELS, UNREADABLE, StoredImage, check_header
from observe_r1.ladder.index import SampleSpan, open_index
from observe_r1.ladder.manifest import FILE_NAME, Manifest
from observe_r1.ladder.sample import BadSample, Reason, Sample, parse_json, to_prompt

logger = logging.getLogger(__name__)

IMAGE_MEMBER = re.compile(r"img(\d+)\.(?:png|jpe?g|webp)")


@dataclass(frozen=True)
class _Slot:
    """One position of the ladder: where its sample lies, or why it is out of reach."""

    tar: Path
    span: SampleSpan | None
    reason: Reason = "shard_truncated"


class LadderDataset(Dataset[Prompt | Skipped]):
    """The samples of a ladder by position. A bad sample is a `Skipped` in its place, so no position ever moves.

    For a `DataLoader`, pass `batch_size=None` or a `collate_fn`: prompts are not tensors. No file stays open between
    two samples, so workers may be forked or spawned.

    Args:
        ladder: A directory with `ladder.json`, or tars from elsewhere that follow the same schema: a directory, one
            tar, a glob, or a list of tars, which is read in the order given (the others in alphabetical order).
        max_image_pixels: Largest width × height of an image, compared with its header before anything is decoded.
        missing_shards: What to do about a tar that `ladder.json` names and that is not there: refuse the ladder, or
            return `Skipped` for each of its positions.

    Attributes:
        problems: Shards by what is wrong with them: `shard_missing`, `shard_truncated` or `shard_corrupt`. The samples
            of such a shard that `ladder.json` announces and the tar does not hold are `Skipped` too.

    Raises:
        ValueError: The ladder has no shards, a shard is missing or no tar, or `ladder.json` belongs to other shards.
    """

    def __init__(
        self,
        ladder: str | Path | Sequence[str | Path],
        *,
        max_image_pixels: int = DEFAULT_MAX_PIXELS,
        missing_shards: Literal["error", "skip"] = "error",
    ) -> None:
        if missing_shards not in ("error", "skip"):
            raise ValueError(f"missing_shards is {missing_shards!r}; choose 'error' or 'skip'")
        self.problems: Counter[str] = Counter()
        self._decoder = _safe_decoder(max_image_pixels)
        self._slots: list[_Slot] = []
        for tar, announced in _shards(ladder):
            self._slots += self._slots_of(tar, announced, missing_shards == "skip")

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, position: int) -> Prompt | Skipped:
        """The prompt at `position`, or the reason why there is none.

        Raises:
            IndexError: The position is not one of 0 … len − 1.
        """
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} of a ladder with {len(self)} samples")
        slot = self._slots[position]
        if slot.span is None:
            return Skipped(position, slot.reason, str(slot.tar))
        try:
            return to_prompt(self._decode(read_members(slot.tar, slot.span)), position)
        except BadSample as bad:
            return Skipped(position, bad.reason, f"{slot.tar}, sample {slot.span.key}: {bad.detail}")

    @property
    def difficulties(self) -> list[float | None]:
        """The difficulty at each position, from the index alone; None where it is unknown or out of reach."""
        return [None if slot.span is None else slot.span.difficulty for slot in self._slots]

    @property
    def stored_bytes(self) -> list[int]:
        """What the sample at each position takes in its tar, from the index alone; 0 where it is out of reach."""
        return [0 if slot.span is None else slot.span.length for slot in self._slots]

    def _slots_of(self, tar: Path, announced: int | None, skip_missing: bool) -> list[_Slot]:
        if not tar.is_file():
            if announced is None or not skip_missing:
                skip = "" if announced is None else ", or set missing_shards to skip to train without its samples"
                raise ValueError(f"shard {tar} is missing; restore the file{skip}")
            self.problems["shard_missing"] += 1
            logger.warning("%s is missing: its %d samples are skipped", tar, announced)
            return [_Slot(tar, None, "shard_missing")] * announced
        index = open_index(tar)
        if index.problem is not None:
            self.problems[index.problem] += 1
            logger.warning(
                "%s: %s after sample %d; the rest of the shard is lost", tar, index.problem, len(index.spans)
            )
        slots = [_Slot(tar, span) for span in index.spans]
        if announced is None or len(slots) == announced:
            return slots
        if len(slots) > announced or index.problem is None:
            raise ValueError(
                f"{tar} holds {len(slots)} samples, {FILE_NAME} says {announced}; they do not belong together: "
                "restore the shard, or build the ladder again"
            )
        return slots + [_Slot(tar, None, index.problem)] * (announced - len(slots))

    def _decode(self, members: dict[str, bytes]) -> Sample[Image.Image]:
        try:
            decoded = self._decoder(members)
        except DecodingError as error:
            cause = error.__cause__
            if isinstance(cause, BadSample):
                raise cause from None
            if isinstance(cause, UNREADABLE):
                raise BadSample("image_corrupt", f"{error.k}: {cause}") from cause
            raise
        document = decoded.pop("json")
        return Sample.from_document(document, list(decoded.values()))


def read_members(tar: Path, span: SampleSpan) -> dict[str, bytes]:
    """The bytes of a sample's members, `json` first, then the images in order. Nothing else of the tar is read.

    Raises:
        BadSample: The bytes are not one sample with a JSON member and images numbered from 0.
    """
    with open(tar, "rb", buffering=0) as file:
        file.seek(span.offset)
        content = file.read(span.length)
    if len(content) < span.length:
        raise BadSample("shard_truncated", f"{len(content)} of {span.length} bytes at offset {span.offset}")
    try:
        files = tar_file_iterator(io.BytesIO(content), select_files=_is_read)
        groups = list(group_by_keys({**file, "__url__": str(tar)} for file in files))
    except tarfile.TarError as error:
        raise BadSample("shard_corrupt", str(error)) from error
    except ValueError as error:  # what group_by_keys raises when a name occurs twice
        raise BadSample("member_duplicate", str(error.args[0])) from error
    if not groups:
        raise BadSample("json_missing", "the sample has no JSON member and no images")
    if [group["__key__"] for group in groups] != [span.key]:
        raise BadSample("shard_corrupt", f"expected sample {span.key}, found {[group['__key__'] for group in groups]}")
    return _in_order({name: data for name, data in groups[0].items() if not name.startswith("__")})


def read_stored(tar: Path, span: SampleSpan) -> Sample[StoredImage]:
    """A sample with its images as they are stored, for writing it elsewhere.

    Raises:
        BadSample: The sample does not follow the schema.
    """
    members = read_members(tar, span)
    document = parse_json(members.pop("json"))
    return Sample.from_document(
        document, [StoredImage(data, name.rpartition(".")[2]) for name, data in members.items()]
    )


def _is_read(file_name: str) -> bool:
    _, name = base_plus_ext(file_name)
    return name is not None and (name.lower() == "json" or IMAGE_MEMBER.fullmatch(name.lower()) is not None)


def _in_order(members: dict[str, bytes]) -> dict[str, bytes]:
    if "json" not in members:
        raise BadSample("json_missing", f"the sample has only {', '.join(sorted(members))}")
    numbered = sorted((int(match[1]), name) for name in members if (match := IMAGE_MEMBER.fullmatch(name)))
    if [index for index, _ in numbered] != list(range(len(numbered))):
        names = ", ".join(name for _, name in numbered)
        raise BadSample("image_count_mismatch", f"image members are not numbered 0, 1, 2, …: {names}")
    return {name: members[name] for name in ("json", *(name for _, name in numbered))}


def _safe_decoder(max_image_pixels: int) -> Decoder:
    """webdataset's decoder without its default handlers, which unpickle what a tar brings along."""
    return Decoder(
        [imagehandler("pilrgb")],
        pre=[partial(_check_image, max_pixels=max_image_pixels)],
        post=[_decode_json],
    )


def _check_image(name: str, data: bytes, max_pixels: int) -> None:
    if name != ".json":
        check_header(data, max_pixels)


def _decode_json(name: str, data: bytes) -> Any:
    return parse_json(data) if name == ".json" else None


def _shards(ladder: str | Path | Sequence[str | Path]) -> Iterator[tuple[Path, int | None]]:
    """The tars of a ladder in order, each with the number of samples its manifest announces."""
    if not isinstance(ladder, (str, Path)):
        tars = [Path(tar) for tar in ladder]
    elif (directory := Path(ladder)).is_dir():
        if (directory / FILE_NAME).is_file():
            yield from ((directory / shard.file, shard.samples) for shard in Manifest.load(directory).shards)
            return
        tars = sorted(directory.glob("*.tar"))
    elif directory.suffix == ".tar" and not glob.has_magic(str(ladder)):
        tars = [directory]
    else:
        tars = [Path(name) for name in sorted(glob.glob(str(ladder)))]
    if not tars:
        raise ValueError(f"{ladder} holds no shards; give a directory with {FILE_NAME}, or tars by name or glob")
    yield from ((tar, None) for tar in tars)
