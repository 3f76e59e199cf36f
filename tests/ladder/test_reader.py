"""Reading samples by position: the right bytes, safely, with every defect in its place."""

from __future__ import annotations

import json
import os
import pickle
import struct
import tarfile
import tracemalloc
import zlib
from pathlib import Path

import pytest
from PIL import Image, ImageFile
from torch.utils.data import DataLoader, SequentialSampler

from observe_r1.experience import Prompt, Skipped
from observe_r1.ladder import images, reader
from observe_r1.ladder.index import open_index
from observe_r1.ladder.members import split_members
from observe_r1.ladder.reader import LadderDataset, read_stored
from observe_r1.ladder.sample import BadSample
from observe_r1.ladder.shards import write_ladder


@pytest.fixture
def ladder(tmp_path, make_sample):
    """Nine samples in three shards; sample n has n % 3 images and difficulty n / 8."""
    directory = tmp_path / "ladder"
    samples = (make_sample(number, number % 3, difficulty=number / 8) for number in range(9))
    write_ladder(samples, directory, samples_per_shard=3)
    return directory


class Touch:
    """Unpickling an instance creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class TestPrompts:
    def test_each_position_gives_its_sample(self, ladder):
        dataset = LadderDataset(ladder)
        assert len(dataset) == 9
        for position in reversed(range(9)):
            prompt = dataset[position]
            assert isinstance(prompt, Prompt)
            assert (prompt.id, prompt.position) == (f"geo.3k-{position}", position)
            assert [image.getpixel((0, 0)) for image in prompt.images] == [
                (position, index, 0) for index in range(position % 3)
            ]
            assert all(image.mode == "RGB" for image in prompt.images)
        assert not dataset.problems

    @pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
    def test_tars_of_other_tools_give_the_same_samples(self, ladder, tmp_path, tar_format):
        """Names of 150 characters have a header of their own, or a part of the next one."""
        for shard in sorted(ladder.glob("*.tar")):
            with tarfile.open(shard) as stored, tarfile.open(tmp_path / shard.name, "w", format=tar_format) as tar:
                for member in stored:
                    content = stored.extractfile(member)
                    member.name = f"{'d' * 100}/{'k' * 30}{member.name}"
                    member.pax_headers = {"comment": "written elsewhere"} if tar_format == tarfile.PAX_FORMAT else {}
                    tar.addfile(member, content)
        assert list(LadderDataset(tmp_path)) == list(LadderDataset(ladder))

    @pytest.mark.parametrize("position", [-1, 9])
    def test_other_positions_do_not_exist(self, ladder, position):
        with pytest.raises(IndexError, match=f"position {position} of a ladder with 9"):
            LadderDataset(ladder)[position]

    def test_difficulties_come_without_reading_a_shard(self, ladder, monkeypatch):
        dataset = LadderDataset(ladder)
        monkeypatch.setattr(os, "pread", lambda *_: pytest.fail("read a sample"))
        assert dataset.difficulties == [number / 8 for number in range(9)]

    def test_more_than_ten_images_keep_their_order(self, tmp_path, make_sample):
        write_ladder([make_sample(7, 12)], tmp_path / "ladder")
        prompt = LadderDataset(tmp_path / "ladder")[0]
        assert [image.getpixel((0, 0))[1] for image in prompt.images] == list(range(12))

    def test_only_the_samples_own_bytes_are_read(self, ladder, monkeypatch):
        dataset = LadderDataset(ladder)
        reads = []
        pread = os.pread

        def counted(descriptor, length, offset):
            content = pread(descriptor, length, offset)
            reads.append((offset, len(content)))
            return content

        span = open_index(ladder / "shard-000001.tar").spans[1]
        monkeypatch.setattr(os, "pread", counted)
        dataset[4]
        assert reads == [(span.offset, span.length)]

    def test_a_stored_sample_keeps_its_encoded_bytes(self, ladder, make_sample):
        tar = ladder / "shard-000001.tar"
        assert read_stored(tar, open_index(tar).spans[2]) == make_sample(5, 2, difficulty=5 / 8)


@pytest.mark.parametrize(("workers", "context"), [(0, None), (1, "fork"), (2, "fork"), (2, "spawn")])
def test_the_order_is_the_ladders_for_any_number_of_workers(ladder, workers, context):
    dataset = LadderDataset(ladder)
    dataset[0]  # whatever a parent process keeps open must not reach its workers
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=SequentialSampler(dataset),
        num_workers=workers,
        multiprocessing_context=context,
    )
    assert [prompt.id for prompt in loader] == [f"geo.3k-{number}" for number in range(9)]


class TestDefects:
    @pytest.fixture
    def read_one(self, tmp_path, write_tar):
        def read(*members, **options):
            return LadderDataset(write_tar(tmp_path / "t.tar", members), **options)[0]

        return read

    def test_corrupt_image(self, read_one, document, encoded):
        skipped = read_one(("a.json", document()), ("a.img0.png", encoded(size=(60, 60), color=(1, 2, 3))[:70]))
        assert isinstance(skipped, Skipped)
        assert (skipped.position, skipped.reason) == (0, "image_corrupt")
        assert "t.tar at byte 0: img0.png: " in skipped.detail

    def test_something_else_under_the_name_of_an_image(self, read_one, document):
        postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
        assert read_one(("a.json", document()), ("a.img0.png", postscript)).reason == "image_corrupt"

    def test_too_large_image_is_not_decoded(self, read_one, document, encoded, monkeypatch):
        members = ("a.json", document()), ("a.img0.png", encoded(size=(100, 100)))
        monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
        assert read_one(*members, max_image_pixels=9_999).reason == "image_too_large"

    def test_decompression_bomb(self, read_one, document, encoded, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        members = ("a.json", document()), ("a.img0.png", encoded(size=(100, 100)))
        assert read_one(*members).reason == "image_too_large"

    @pytest.mark.parametrize(
        ("names", "reason"),
        [
            ([], "image_count_mismatch"),
            (["img0.png", "img1.png"], "image_count_mismatch"),
            (["img1.png"], "image_count_mismatch"),
            (["img0.png", "img0.jpg"], "image_count_mismatch"),
            (["img0.gif"], "image_count_mismatch"),
            (["png"], "image_count_mismatch"),
            (["img0.png", "img0.png"], "member_duplicate"),
            (["img0.png", "meta.json", "left.img1.png", "txt"], None),
            (["IMG0.JPEG"], None),
        ],
    )
    def test_image_members(self, read_one, document, encoded, names, reason):
        result = read_one(("a.json", document()), *((f"a.{name}", encoded()) for name in names))
        assert getattr(result, "reason", None) == reason

    @pytest.mark.parametrize("content", [b"{", b"null", b"[]", b"\xff"])
    def test_json(self, read_one, content):
        assert read_one(("a.json", content)).reason == "json_invalid"

    def test_no_json(self, read_one, encoded):
        assert read_one(("a.img0.png", encoded())).reason == "json_missing"
        assert read_one(("a.txt", b"")).reason == "json_missing"

    def test_schema(self, read_one, document):
        assert read_one(("a.json", document(0, answer="\\frac{"))).reason == "gold_unparseable"

    @pytest.mark.parametrize("suffix", ["pyd", "pickle", "pkl", "pth", "json.pyd", "img0.pickle", "pyd.gz"])
    def test_pickles_are_never_loaded(self, tmp_path, read_one, document, suffix):
        evidence = tmp_path / "evidence"
        assert isinstance(read_one(("a.json", document(0)), (f"a.{suffix}", pickle.dumps(Touch(evidence)))), Prompt)
        assert not evidence.exists()
        pickle.loads(pickle.dumps(Touch(evidence)))
        assert evidence.exists()

    def test_a_programming_error_is_not_swallowed(self, ladder, monkeypatch):
        def broken(*_, **__):
            raise AttributeError("a bug")

        monkeypatch.setattr(reader, "to_prompt", broken)
        with pytest.raises(AttributeError, match="a bug"):
            LadderDataset(ladder)[0]

    def test_a_programming_error_in_decoding_is_not_swallowed(self, ladder, monkeypatch):
        def broken(*_, **__):
            raise AttributeError("a bug")

        monkeypatch.setattr(images, "check_header", broken)
        with pytest.raises(AttributeError, match="a bug"):
            LadderDataset(ladder)[1]

    def test_a_shard_that_changes_under_the_index(self, ladder):
        dataset = LadderDataset(ladder)
        shard = ladder / "shard-000000.tar"
        content = bytearray(shard.read_bytes())
        shard.write_bytes(content[: open_index(shard).spans[2].offset + 100])
        assert isinstance(dataset[1], Prompt)
        assert dataset[2].reason == "shard_truncated"
        content[0] ^= 0xFF
        shard.write_bytes(content)
        assert dataset[0].reason == "shard_changed"

    def test_a_shard_with_other_samples_under_the_index(self, tmp_path, write_tar, document):
        tar = write_tar(tmp_path / "t.tar", [("a.json", document(0))])
        dataset = LadderDataset(tar)
        write_tar(tar, [("b.json", document(0))])
        assert dataset[0].reason == "shard_changed"


class TestShards:
    def test_a_truncated_shard_moves_no_position(self, ladder):
        shard = ladder / "shard-000001.tar"
        shard.write_bytes(shard.read_bytes()[: open_index(shard).spans[1].offset + 600])
        dataset = LadderDataset(ladder)
        results = list(dataset)
        assert len(dataset) == 9
        assert dataset.problems == {"shard_truncated": 1}
        assert [result.reason for result in results if isinstance(result, Skipped)] == ["shard_truncated"] * 2
        assert [result.position for result in results] == list(range(9))
        assert results[6].id == "geo.3k-6"
        assert dataset.difficulties[3:6] == [3 / 8, None, None]

    def test_a_missing_shard_is_refused_by_default(self, ladder):
        (ladder / "shard-000001.tar").unlink()
        with pytest.raises(
            ValueError, match=r"shard-000001\.tar is missing; restore the file, or set missing_shards to skip"
        ):
            LadderDataset(ladder)

    def test_a_missing_shard_is_skipped_on_request(self, ladder):
        (ladder / "shard-000001.tar").unlink()
        dataset = LadderDataset(ladder, missing_shards="skip")
        assert dataset.problems == {"shard_missing": 1}
        assert [getattr(result, "reason", "") for result in dataset] == [""] * 3 + ["shard_missing"] * 3 + [""] * 3

    def test_an_unknown_choice_is_refused(self, ladder):
        with pytest.raises(ValueError, match="missing_shards is 'ignore'; choose"):
            LadderDataset(ladder, missing_shards="ignore")

    def test_a_shard_of_another_ladder_is_refused(self, ladder, tmp_path, make_sample):
        write_ladder(map(make_sample, range(2)), tmp_path / "other")
        (tmp_path / "other" / "shard-000000.tar").replace(ladder / "shard-000001.tar")
        with pytest.raises(ValueError, match=r"holds 2 samples, ladder\.json says 3"):
            LadderDataset(ladder)

    def test_foreign_tars(self, tmp_path, write_tar, document, encoded):
        for name in ("b", "a"):
            members = [(f"{name}/7.json", document(id=name)), (f"{name}/7.img0.webp", encoded(format="WEBP"))]
            write_tar(tmp_path / f"{name}.tar", members)
        a, b = tmp_path / "a.tar", tmp_path / "b.tar"
        for ladder, expected in [
            (tmp_path, ["a", "b"]),
            (str(tmp_path / "*.tar"), ["a", "b"]),
            ([b, str(a)], ["b", "a"]),
            (b, ["b"]),
        ]:
            assert [prompt.id for prompt in LadderDataset(ladder)] == expected

    def test_nothing_to_read(self, tmp_path):
        for ladder in (tmp_path, str(tmp_path / "*.tar"), []):
            with pytest.raises(ValueError, match="holds no shards"):
                LadderDataset(ladder)
        with pytest.raises(ValueError, match=r"no\.tar is missing; restore the file$"):
            LadderDataset(tmp_path / "no.tar")

    def test_the_held_out_part_beside_the_shards_is_not_read(self, ladder, make_sample):
        write_ladder([make_sample()], ladder / "held_out")
        assert len(LadderDataset(ladder)) == 9
        assert json.loads((ladder / "ladder.json").read_text())["samples"] == 9


class TestHostileTars:
    def test_the_same_shard_twice_trains_once(self, ladder, tmp_path):
        copy = tmp_path / "copy.tar"
        copy.write_bytes((ladder / "shard-000001.tar").read_bytes())
        dataset = LadderDataset([*sorted(ladder.glob("*.tar")), copy, ladder / "shard-000000.tar"])
        assert dataset.problems == {"shard_duplicate": 2}
        results = [getattr(result, "reason", None) for result in dataset]
        assert results == [None] * 9 + ["shard_duplicate"] * 6

    @pytest.mark.parametrize(("content", "problem"), [(b"", "shard_truncated"), (bytes(10240), None)])
    def test_an_empty_tar(self, ladder, content, problem):
        (ladder / "ladder.json").unlink()
        (ladder / "shard-000001.tar").write_bytes(content)
        dataset = LadderDataset(ladder)
        assert dataset.problems == ({} if problem is None else {problem: 1})
        assert [prompt.id for prompt in dataset] == [f"geo.3k-{number}" for number in (0, 1, 2, 6, 7, 8)]

    def test_every_flipped_bit_of_a_sample_is_noticed(self, tmp_path, make_sample):
        write_ladder(map(make_sample, range(3)), tmp_path / "ladder")
        tar = tmp_path / "ladder" / "shard-000000.tar"
        dataset = LadderDataset(tmp_path / "ladder")
        span = open_index(tar).spans[1]
        whole = tar.read_bytes()
        for place in range(span.offset, span.offset + span.length, 7):
            content = bytearray(whole)
            content[place] ^= 1 << place % 8
            tar.write_bytes(content)
            assert dataset[1].reason == "shard_changed"
        assert isinstance(dataset[0], Prompt)

    def test_keys_with_dots(self, tmp_path, write_tar, document, encoded):
        members = [(f"v1.{number}.json", document(0)) for number in (5, 6)]
        (skipped,) = LadderDataset(write_tar(tmp_path / "t.tar", members))
        assert skipped.reason == "key_with_dots"
        assert "5.json, 6.json" in skipped.detail
        members = [("folder.v1/a.json", document(1)), ("folder.v1/a.img0.png", encoded())]
        assert isinstance(LadderDataset(write_tar(tmp_path / "u.tar", members))[0], Prompt)

    def test_names_that_point_elsewhere_are_only_names(self, tmp_path, write_tar, document, encoded):
        folder = tmp_path / "a" / "b"
        folder.mkdir(parents=True)
        members = []
        for name in ("../../evil", str(tmp_path / "evil"), "x/../../../evil2"):
            members += [(f"{name}.json", document(1)), (f"{name}.img0.png", encoded())]
        dataset = LadderDataset(write_tar(folder / "t.tar", members))
        assert all(isinstance(sample, Prompt) for sample in dataset)
        assert {path.name for path in tmp_path.rglob("*")} == {"a", "b", "t.tar", "t.tar.idx"}

    def test_links_and_devices_are_not_followed(self, tmp_path, document):
        secret = tmp_path / "secret.json"
        secret.write_text(json.dumps(document(0)))
        with tarfile.open(tmp_path / "t.tar", "w") as tar:
            for number, (kind, target) in enumerate([(tarfile.SYMTYPE, str(secret)), (tarfile.CHRTYPE, "")]):
                member = tarfile.TarInfo(f"{number}.json")
                member.type, member.linkname = kind, target
                tar.addfile(member)
            member = tarfile.TarInfo("9.txt")
            tar.addfile(member)
        assert [sample.reason for sample in LadderDataset(tmp_path / "t.tar")] == ["json_missing"]

    def test_decompression_bombs(self, tmp_path, write_tar, document):
        def chunk(kind: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        def png(width: int, height: int, *chunks: bytes) -> bytes:
            header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")

        zeros, pixels = zlib.compress(bytes(200_000_000)), chunk(b"IDAT", zlib.compress(bytes(200)))
        bombs = {
            "pixels": (png(100_000, 100_000, chunk(b"IDAT", zeros)), "image_too_large"),
            "text": (png(8, 8, chunk(b"zTXt", b"a\0\0" + zeros), pixels), "image_corrupt"),
        }
        members = []
        for key, (content, _) in bombs.items():
            members += [(f"{key}.json", document(1)), (f"{key}.img0.png", content)]
        dataset = LadderDataset(write_tar(tmp_path / "t.tar", members))
        tracemalloc.start()
        reasons = [sample.reason for sample in dataset]
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert reasons == [reason for _, reason in bombs.values()]
        assert peak < 100_000_000

    def test_a_member_that_claims_to_be_huge(self, tmp_path, write_tar, document):
        tar = write_tar(tmp_path / "t.tar", [("a.json", document(0)), ("b.json", document(0))])
        content = bytearray(tar.read_bytes())
        second = open_index(tar).spans[1].offset
        header = tarfile.TarInfo("b.json")
        header.size = 8 * 1024**4
        content[second : second + 512] = header.tobuf(tarfile.GNU_FORMAT)
        tar.write_bytes(content)
        dataset = LadderDataset(tar)
        assert len(dataset) == 1
        assert dataset.problems == {"shard_truncated": 1}

    @pytest.mark.parametrize("size", [b"-0000001000\0", b"\xff" * 10 + b"\xfe\0"], ids=["octal", "binary"])
    def test_a_member_of_negative_size(self, tmp_path, write_tar, document, size):
        """Behind it the same header would be due again, for ever."""
        tar = write_tar(tmp_path / "t.tar", [("a.json", document(0)), ("a.img0.png", b"data")])
        content = bytearray(tar.read_bytes())
        content[1024 + 124 : 1024 + 136] = size
        content[1024 + 148 : 1024 + 156] = b" " * 8
        content[1024 + 148 : 1024 + 156] = b"%06o\0 " % sum(content[1024:1536])
        tar.write_bytes(content)
        assert LadderDataset(tar).problems == {"shard_corrupt": 1}
        with pytest.raises(BadSample, match="shard_corrupt: "):
            split_members(bytes(content[:2048]))
