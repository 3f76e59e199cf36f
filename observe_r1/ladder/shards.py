"""Writing a ladder: samples in, tar shards with their index and `ladder.json` out."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from webdataset import ShardWriter

from observe_r1.experience import Prompt
from observe_r1.ladder.images import StoredImage, store_image
from observe_r1.ladder.index import open_index
from observe_r1.ladder.manifest import Manifest, Shard, level_name
from observe_r1.ladder.sample import Sample, from_prompt

SHARD_PATTERN = "shard-%06d.tar"
KEY_DIGITS = 9


def write_ladder(
    samples: Iterable[Sample[StoredImage] | Prompt],
    directory: Path,
    *,
    samples_per_shard: int = 1000,
    built: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write `samples`, in the order given, as a ladder; one sample at a time is held in memory.

    The position of a sample becomes its key in the shards. The ladder appears in `directory` all at once when it is
    complete, and the same samples always give the same bytes.

    Args:
        samples: At least one. The images of a prompt are stored as PNG.
        directory: Must not exist yet, or be empty.
        samples_per_shard: Samples in every shard but the last, which may hold fewer.
        built: How the ladder was made, kept in `ladder.json`.

    Raises:
        BadSample: A prompt does not follow the schema of samples.
        ValueError: There are no samples, the directory holds something, or `samples_per_shard` is less than 1.
    """
    with appearing_at_once(directory) as unfinished:
        return write_shards(samples, unfinished, samples_per_shard, built or {})


def write_shards(
    samples: Iterable[Sample[StoredImage] | Prompt], directory: Path, samples_per_shard: int, built: Mapping[str, Any]
) -> Manifest:
    """Write a ladder into an existing directory, file by file. Arguments and errors are `write_ladder`'s."""
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard is {samples_per_shard}; it must be at least 1")
    shards: list[Shard] = []
    levels: Counter[str] = Counter()

    def finish(name: str) -> None:
        tar = Path(name)
        shards.append(Shard.of(tar, len(open_index(tar).spans)))

    remaining = iter(samples)
    first = next(remaining, None)  # before the writer opens its first file
    if first is None:
        raise ValueError(f"no samples to write to {directory}: a ladder needs at least one")
    pattern = str(directory.absolute()).replace("%", "%%") + f"/{SHARD_PATTERN}"
    writer = ShardWriter(
        pattern, maxcount=samples_per_shard, post=finish, verbose=0, encoder=False, mtime=0, user="", group=""
    )
    with writer:
        for position, item in enumerate(chain([first], remaining)):
            sample = (
                from_prompt(item, [store_image(image) for image in item.images]) if isinstance(item, Prompt) else item
            )
            writer.write({"__key__": f"{position:0{KEY_DIGITS}d}", **_members(sample)})
            levels[level_name(sample.difficulty)] += 1
    manifest = Manifest(tuple(shards), dict(sorted(levels.items())), dict(built))
    manifest.save(directory)
    return manifest


@contextmanager
def appearing_at_once(directory: Path) -> Iterator[Path]:
    """A directory to fill, which takes the place of `directory` when the block ends and vanishes if it fails.

    Raises:
        ValueError: `directory` exists and is not an empty directory.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} exists already; choose another directory or delete it first")
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        unfinished.chmod(0o755)  # mkdtemp's 0700 would lock out the other users of a shared data set
        yield unfinished
        unfinished.replace(directory)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _members(sample: Sample[StoredImage]) -> dict[str, bytes]:
    document = json.dumps(sample.to_document(), ensure_ascii=False, sort_keys=True)
    images = {f"img{index}.{image.extension}": image.data for index, image in enumerate(sample.images)}
    return {"json": document.encode(), **images}
