"""The members of one sample, out of the bytes that it takes in its tar."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator

from webdataset.tariterators import base_plus_ext

from observe_r1.ladder.sample import BadSample

IMAGE_MEMBER = re.compile(r"img(\d+)\.(?:png|jpe?g|webp)")
SKIPPED_NAME = re.compile(r"__[^/]*__($|/)")  # webdataset's own default for members that are not data


def split_members(content: bytes) -> dict[str, bytes]:
    """The sample's members by name without key, `json` first, then the images in order. Others are left out.

    Raises:
        BadSample: The bytes are not a sample with a JSON member and images numbered from 0.
    """
    members: dict[str, bytes] = {}
    others = []
    for file_name, data in _files(content):
        key, name = base_plus_ext(file_name)
        if key is None or SKIPPED_NAME.match(file_name):
            continue
        name = name.lower()
        if name != "json" and IMAGE_MEMBER.fullmatch(name) is None:
            others.append(name)
            continue
        if name in members:
            raise BadSample("member_duplicate", f"{file_name} occurs twice")
        members[name] = data
    if "json" not in members and any(name.endswith(".json") for name in others):
        raise BadSample("key_with_dots", f"a key ends at the first dot, so these are one sample: {', '.join(others)}")
    if "json" not in members:
        raise BadSample("json_missing", f"the sample has only {', '.join(sorted(members)) or 'members of other names'}")
    numbered = sorted((int(match[1]), name) for name in members if (match := IMAGE_MEMBER.fullmatch(name)))
    if [index for index, _ in numbered] != list(range(len(numbered))):
        names = ", ".join(name for _, name in numbered)
        raise BadSample("image_count_mismatch", f"image members are not numbered 0, 1, 2, …: {names}")
    return {name: members[name] for name in ("json", *(name for _, name in numbered))}


def _files(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and data of every regular file in a piece of a tar that starts at a header."""
    files = _plain_files(content)
    if files is not None:
        yield from files
        return
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            for member in archive:
                if archive.offset <= member.offset:
                    raise BadSample("shard_corrupt", f"{member.name} has a negative size")
                data = archive.extractfile(member) if member.isreg() else None
                if data is not None:
                    yield member.name, data.read()
    except tarfile.TarError as error:
        raise BadSample("shard_corrupt", str(error)) from error


def _plain_files(content: bytes) -> list[tuple[str, bytes]] | None:
    """The same, where all of them are plain files with plain headers, faster than `tarfile`. None elsewhere.

    Header checksums are not looked at: the checksum of the whole sample has been.
    """
    files = []
    position = 0
    while position < len(content):
        header = content[position : position + tarfile.BLOCKSIZE]
        # regular, and with the size in octal digits; other types may belong to the file that follows
        if len(header) < tarfile.BLOCKSIZE or header[156] != 0x30 or header[124] > 0x37:
            return None
        try:
            name = header[:100].partition(b"\0")[0].decode()
            prefix = header[345:500].partition(b"\0")[0].decode()
            size = int(header[124:136].partition(b"\0")[0], 8)
        except ValueError:
            return None
        if size < 0:  # the next header would be this one again
            raise BadSample("shard_corrupt", f"{name} has a negative size")
        start = position + tarfile.BLOCKSIZE
        files.append((f"{prefix}/{name}" if prefix else name, content[start : start + size]))
        position = start + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return files
