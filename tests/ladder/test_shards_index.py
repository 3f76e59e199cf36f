"""Writing shards, their byte index, and indexing tars that other tools wrote."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import random
import struct
import tarfile
import zlib
from pathlib import Path

import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from observe_r1.answers import Gold
from observe_r1.experience import Prompt
from observe_r1.ladder import index as index_module
from observe_r1.ladder.index import build_index, index_path, open_index
from observe_r1.ladder.manifest import Manifest, Shard
from observe_r1.ladder.sample import BadSample
from observe_r1.ladder.shards import write_ladder


def checksums(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def spans_by_tarfile(tar: Path) -> list[tuple[str, int, int]]:
    """Key, offset and length of each sample, from a second look with the standard library."""
    starts: dict[str, int] = {}
    ends: dict[str, int] = {}
    with tarfile.open(tar) as archive:
        for member in archive.getmembers():
            key = member.name.partition(".")[0]
            starts.setdefault(key, member.offset)
            ends[key] = member.offset_data + (member.size + 511) // 512 * 512
    return [(key, starts[key], ends[key] - starts[key]) for key in starts]


class TestWriting:
    def test_two_builds_give_the_same_bytes(self, tmp_path, make_sample):
        for name in ("one", "two"):
            write_ladder((make_sample(number, number % 3) for number in range(7)), tmp_path / name, samples_per_shard=3)
        assert checksums(tmp_path / "one") == checksums(tmp_path / "two")

    def test_the_manifest_describes_the_shards(self, tmp_path, make_sample):
        difficulties = [0.25, 0.25, None, 1 / 3, 1.0]
        samples = (make_sample(number, difficulty=difficulty) for number, difficulty in enumerate(difficulties))
        written = write_ladder(samples, tmp_path / "ladder", samples_per_shard=2, built={"from": "a test"})
        manifest = Manifest.load(tmp_path / "ladder")
        assert manifest == written
        assert [(shard.file, shard.samples) for shard in manifest.shards] == [
            ("shard-000000.tar", 2),
            ("shard-000001.tar", 2),
            ("shard-000002.tar", 1),
        ]
        assert manifest.samples == 5
        assert manifest.levels == {"0.25": 2, "0.3333": 1, "1": 1, "unknown": 1}
        assert manifest.built == {"from": "a test"}
        assert manifest.verify(tmp_path / "ladder") == []

    def test_a_damaged_shard_is_found(self, tmp_path, make_sample):
        manifest = write_ladder(map(make_sample, range(4)), tmp_path / "ladder", samples_per_shard=2)
        shard = tmp_path / "ladder" / "shard-000001.tar"
        content = bytearray(shard.read_bytes())
        content[600] ^= 1
        shard.write_bytes(content)
        (tmp_path / "ladder" / "shard-000000.tar").unlink()
        assert manifest.verify(tmp_path / "ladder") == ["shard-000000.tar", "shard-000001.tar"]

    def test_webdataset_reads_the_shards(self, tmp_path, make_sample):
        write_ladder([make_sample(3, 2)], tmp_path / "ladder")
        tar = str(tmp_path / "ladder" / "shard-000000.tar")
        (group,) = webdataset.WebDataset(tar, shardshuffle=False).decode("pilrgb")
        assert group["__key__"] == "000000000"
        assert group["json"]["id"] == "geo.3k-3"
        assert group["img1.png"].getpixel((0, 0)) == (3, 1, 0)

    def test_prompts_are_written_too(self, tmp_path):
        content = [{"type": "image", "index": 0}, {"type": "text", "text": "Which colour?"}]
        prompt = Prompt("a", "test", [{"role": "user", "content": content}], [Image.new("RGB", (4, 4))], Gold("black"))
        assert write_ladder([prompt], tmp_path / "ladder").samples == 1

    def test_what_exists_is_not_overwritten(self, tmp_path, make_sample):
        write_ladder([make_sample()], tmp_path)
        with pytest.raises(ValueError, match="exists already; choose another"):
            write_ladder([make_sample()], tmp_path)

    def test_a_failure_leaves_nothing_behind(self, tmp_path, make_sample):
        def samples():
            yield make_sample()
            raise RuntimeError("the source broke")

        with pytest.raises(RuntimeError, match="the source broke"):
            write_ladder(samples(), tmp_path / "ladder")
        assert list(tmp_path.iterdir()) == []

    def test_an_invalid_prompt_is_refused(self, tmp_path):
        prompt = Prompt("a", "test", [{"role": "user", "content": "Which?"}], [Image.new("RGB", (4, 4))], Gold("black"))
        with pytest.raises(BadSample, match="image_count_mismatch"):
            write_ladder([prompt], tmp_path / "ladder")

    def test_no_samples_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="needs at least one"):
            write_ladder([], tmp_path / "ladder")

    def test_no_samples_per_shard_are_refused(self, tmp_path, make_sample):
        with pytest.raises(ValueError, match="samples_per_shard is 0"):
            write_ladder([make_sample()], tmp_path / "ladder", samples_per_shard=0)

    def test_samples_are_taken_one_at_a_time(self, tmp_path, make_sample):
        written_before = []

        def samples():
            for number in range(4):
                written_before.append(sum(1 for _ in tmp_path.glob(".ladder.*/*.idx")))
                yield make_sample(number)

        write_ladder(samples(), tmp_path / "ladder", samples_per_shard=1)
        assert written_before == [0, 0, 0, 1] or written_before == [0, 0, 1, 2]

    def test_a_percent_sign_in_the_path_is_harmless(self, tmp_path, make_sample):
        assert write_ladder([make_sample()], tmp_path / "50%done").samples == 1


class TestManifest:
    def test_a_directory_without_one(self, tmp_path):
        with pytest.raises(ValueError, match=r"has no ladder\.json"):
            Manifest.load(tmp_path)

    @pytest.mark.parametrize("content", ["{", "[]", '{"format_version": 99}', '{"format_version": 1, "shards": [{}]}'])
    def test_an_unusable_one(self, tmp_path, content):
        (tmp_path / "ladder.json").write_text(content)
        with pytest.raises(ValueError, match="not a usable ladder manifest"):
            Manifest.load(tmp_path)


# fixtures that are the same for every example; a slow machine
SUITABLE = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


class TestIndex:
    @settings(deadline=None, max_examples=25, suppress_health_check=SUITABLE)
    @given(images=st.lists(st.integers(0, 3), min_size=1, max_size=6), samples_per_shard=st.integers(1, 4))
    def test_offsets_of_our_shards_are_those_tarfile_finds(
        self, tmp_path_factory, make_sample, images, samples_per_shard
    ):
        directory = tmp_path_factory.mktemp("ladders") / "ladder"
        samples = [make_sample(number, count) for number, count in enumerate(images)]
        manifest = write_ladder(samples, directory, samples_per_shard=samples_per_shard)
        for shard in manifest.shards:
            index = open_index(directory / shard.file)
            assert [(span.key, span.offset, span.length) for span in index.spans] == spans_by_tarfile(
                directory / shard.file
            )
            assert index.problem is None

    @pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
    def test_foreign_tars_with_long_names(self, tmp_path, write_tar, document, encoded, format):
        folder = "a" * (120 if format != tarfile.USTAR_FORMAT else 60)
        members = []
        for name in ("x", "y"):
            key = f"{folder}/{'long' * (15 if format == tarfile.USTAR_FORMAT else 40)}{name}"
            members += [(f"{key}.json", document(difficulty=0.5)), (f"{key}.img0.png", encoded())]
        tar = write_tar(tmp_path / "foreign.tar", members, format)
        spans = build_index(tar).spans
        assert [(span.key, span.offset, span.length) for span in spans] == spans_by_tarfile(tar)
        assert [span.difficulty for span in spans] == [0.5, 0.5]

    def test_directories_metadata_and_dotless_names_are_no_samples(self, tmp_path, write_tar, document):
        tar = write_tar(
            tmp_path / "t.tar",
            [("README", b"x"), ("__meta__/a.json", b"{}"), ("a.json", document(0)), ("LICENCE", b""), ("a.cls", b"1")],
        )
        with tarfile.open(tar, "a") as archive:
            folder = tarfile.TarInfo("folder.json")
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
        (span,) = build_index(tar).spans
        assert span.key == "a"
        assert span.length == 5 * 512  # two members and, between them, an empty one

    def test_difficulties_that_are_none(self, tmp_path, write_tar):
        difficulties = ["x", True, 10**400]
        members = [(f"{number}.json", {"difficulty": value}) for number, value in enumerate(difficulties)]
        tar = write_tar(tmp_path / "t.tar", [("a.json", b"{"), ("b.json", [1]), *members])
        assert [span.difficulty for span in build_index(tar).spans] == [None] * 5

    @settings(deadline=None, suppress_health_check=SUITABLE)
    @given(data=st.data())
    def test_the_readable_part_of_a_truncated_tar(self, tmp_path, make_sample, data):
        source = tmp_path / "ladder"
        if not source.exists():
            write_ladder((make_sample(number, number % 3) for number in range(5)), source)
        content = (source / "shard-000000.tar").read_bytes()
        whole = build_index(source / "shard-000000.tar").spans
        used = whole[-1].offset + whole[-1].length
        cut = data.draw(st.integers(0, used))
        tar = tmp_path / "cut.tar"
        tar.write_bytes(content[:cut])
        index = build_index(tar)
        assert index.problem == "shard_truncated"
        intact = [span for span in whole if span.offset + span.length <= cut]
        assert list(index.spans[: len(intact)]) == intact
        assert len(index.spans) <= len(intact) + 1  # a cut between two members leaves a sample without its JSON

    def test_a_damaged_header_hides_the_rest(self, tmp_path, make_sample):
        write_ladder(map(make_sample, range(3)), tmp_path / "ladder")
        tar = tmp_path / "ladder" / "shard-000000.tar"
        first, second, _ = open_index(tar).spans
        content = bytearray(tar.read_bytes())
        content[second.offset] ^= 0xFF
        tar.write_bytes(content)
        index = build_index(tar)
        assert index.problem == "shard_corrupt"
        assert index.spans == (first,)

    def test_an_empty_file_is_a_truncated_tar(self, tmp_path):
        tar = tmp_path / "t.tar"
        tar.touch()
        assert build_index(tar).problem == "shard_truncated"

    @pytest.mark.parametrize("content", [b"x" * 2048, gzip.compress(random.Random(0).randbytes(2048))])
    def test_what_is_no_tar_is_refused(self, tmp_path, content):
        tar = tmp_path / "t.tar"
        tar.write_bytes(content)
        with pytest.raises(ValueError, match=r"t\.tar is not an uncompressed tar"):
            build_index(tar)


class TestKeepingTheIndex:
    @pytest.fixture
    def tar(self, tmp_path, write_tar, document):
        return write_tar(tmp_path / "t.tar", [("a.json", document(0)), ("b.json", document(0))])

    @pytest.fixture
    def scans(self, monkeypatch):
        """Counts how often a tar is scanned."""
        calls = []

        def counted(tar, files):
            calls.append(tar)
            return build_index(tar, files)

        monkeypatch.setattr(index_module, "build_index", counted)
        return calls

    def test_it_is_read_the_second_time(self, tar, scans):
        assert open_index(tar).spans == open_index(tar).spans
        assert len(scans) == 1

    def test_shards_come_with_theirs(self, tmp_path, make_sample, scans):
        write_ladder([make_sample()], tmp_path / "ladder")
        scans.clear()
        open_index(tmp_path / "ladder" / "shard-000000.tar")
        assert scans == []

    def test_a_tar_of_another_size(self, tar, scans, write_tar, document):
        open_index(tar)
        write_tar(tar, [("a.json", b" " * 20_000)])
        assert [span.key for span in open_index(tar).spans] == ["a"]
        assert len(scans) == 2

    def test_a_tar_of_the_same_size(self, tar, scans, write_tar, document):
        size = tar.stat().st_size
        open_index(tar)
        write_tar(tar, [("c.json", document(0)), ("d.json", document(0))])
        assert tar.stat().st_size == size
        assert [span.key for span in open_index(tar).spans] == ["c", "d"]

    @pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": "observe-r1 tar index", "version": 0}'])
    def test_an_index_that_cannot_be_read(self, tar, scans, content):
        expected = open_index(tar).spans
        index_path(tar).write_text(content)
        assert open_index(tar).spans == expected
        assert open_index(tar).spans == expected
        assert len(scans) == 2

    def test_a_directory_that_cannot_be_written(self, tar, monkeypatch, caplog):
        def refuse(*_, **__):
            raise PermissionError("read-only")

        monkeypatch.setattr(index_module.tempfile, "mkstemp", refuse)
        with caplog.at_level(logging.WARNING):
            assert len(open_index(tar).spans) == 2
        assert "scanned at every start" in caplog.text

    def test_an_index_of_another_tar_or_with_a_flipped_bit(self, tmp_path, tar, scans, make_sample):
        expected = open_index(tar).spans
        whole = index_path(tar).read_bytes()
        for place in range(len(whole)):
            damaged = bytearray(whole)
            damaged[place] ^= 1
            index_path(tar).write_bytes(damaged)
            assert open_index(tar).spans == expected
        write_ladder([make_sample()], tmp_path / "other")
        index_path(tar).write_bytes((tmp_path / "other" / "shard-000000.tar.idx").read_bytes())
        assert open_index(tar).spans == expected

    def test_the_file_holds_arrays(self, tar):
        spans = open_index(tar).spans
        line, _, body = index_path(tar).read_bytes().partition(b"\n")
        assert json.loads(line)["samples"] == 2
        assert body[:16] == struct.pack("<qq", 0, spans[1].offset)
        assert body[32:40] == struct.pack("<II", *(zlib.crc32(tar.read_bytes()[s.offset :][: s.length]) for s in spans))
        assert body.endswith(b"a\0b")
        assert [path.name for path in tar.parent.iterdir() if path.name.startswith(".")] == []


def test_a_shard_entry_measures_the_file(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(b"abc")
    assert Shard.of(path, 1) == Shard("x.tar", 1, 3, hashlib.sha256(b"abc").hexdigest())
