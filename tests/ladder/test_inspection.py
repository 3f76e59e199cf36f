"""The inspection: counts that agree with the ladder, its defects named, and a page that needs nothing else."""

from __future__ import annotations

import base64
import io
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import ExifTags, Image

from observe_r1.ladder.curriculum import PAPER_MIXING, arrange
from observe_r1.ladder.images import StoredImage
from observe_r1.ladder.inspection import inspect
from observe_r1.ladder.inspection_report import inspect_ladder
from observe_r1.ladder.shards import write_ladder
from observe_r1.thumbnails import SMALL_FILE

MIXED = {"mixing": {"levels": PAPER_MIXING.levels, "stages": PAPER_MIXING.stages, "shares": PAPER_MIXING.shares}}


@pytest.fixture
def ladder(tmp_path: Path, make_sample: Any) -> Path:
    """90 samples, the levels as frequent as the paper's matrix with stages of equal size needs them, mixed by it."""
    levels = [round(9 * sum(row[n] / sum(row) for row in PAPER_MIXING.shares) * 10 / 9) for n in range(9)]
    difficulties = [n / 8 for n, count in enumerate(levels) for _ in range(count)]
    tokens = [100.0 + n for n in range(len(difficulties))]
    curriculum = arrange(difficulties, tokens, [str(n) for n in range(len(difficulties))])
    samples = [
        make_sample(
            n, difficulty=difficulties[n], n_correct=round(8 - 8 * difficulties[n]), n_rollouts=8, complexity=tokens[n],
            stage=stage, source="geo" if n % 3 else "k12",
        )
        for n, stage in zip(curriculum.order, curriculum.stages, strict=True)
    ]  # fmt: skip
    write_ladder(samples, tmp_path / "my ladder", samples_per_shard=40, built=MIXED)
    return tmp_path / "my ladder"


class Page(HTMLParser):
    """What a browser would load, and whether every element is closed."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        attributes = dict(attrs)
        assert "href" not in attributes
        assert tag not in ("script", "link", "iframe")
        if tag == "img":
            self.images.append(attributes["src"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_large_pictures_are_upright_and_damaged_ones_named(tmp_path: Path, make_sample: Any) -> None:
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = 6
    Image.effect_noise((600, 400), 100).save(buffer, format="JPEG", exif=exif)
    whole = buffer.getvalue()
    assert len(whole) > 2 * SMALL_FILE
    pictures = [StoredImage(content, "jpg") for content in (whole, whole[: len(whole) // 2])]
    samples = [replace(make_sample(number), images=[picture]) for number, picture in enumerate(pictures)]
    write_ladder(samples, tmp_path / "ladder")
    inspect_ladder(tmp_path / "ladder", page=tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text())
    (shown,) = page.images
    width, height = Image.open(io.BytesIO(base64.b64decode(shown.partition(",")[2]))).size
    assert width < height
    assert "image_corrupt" in page.text


def test_counts_agree_with_the_ladder(ladder: Path) -> None:
    found = inspect(ladder)
    assert found.problems == []
    assert found.samples == sum(found.levels.values()) == sum(found.sources.values())
    assert found.shards == 3
    assert found.images == {1: found.samples}
    assert found.level_names == ["0", "0.125", "0.25", "0.375", "0.5", "0.625", "0.75", "0.875", "1"]
    assert found.tokens_by_level["0"] < found.tokens_by_level["1"]
    assert all(len(samples) == min(3, found.levels[level]) for level, samples in found.examples.items())
    assert all(sample.difficulty == float(level) for level, samples in found.examples.items() for sample in samples)


def test_the_matrix_obtained_is_close_to_the_one_asked_for(ladder: Path) -> None:
    found = inspect(ladder)
    stages, levels, obtained = found.obtained()
    asked = found.asked()
    assert (tuple(stages), tuple(levels)) == (PAPER_MIXING.stages, PAPER_MIXING.levels)
    assert asked is not None
    for row, wanted in zip(obtained, asked, strict=True):
        assert sum(row) == pytest.approx(1)
        assert max(abs(a - b) for a, b in zip(row, wanted, strict=True)) < 0.12  # ten samples a stage


def test_the_page_needs_nothing_else(ladder: Path, tmp_path: Path, capsys: Any) -> None:
    found = inspect_ladder(ladder, page=tmp_path / "pages/my.html", examples=2)
    page = Page((tmp_path / "pages/my.html").read_text())
    shown = [sample for samples in found.examples.values() for sample in samples]
    assert len(page.images) == len(shown)
    for source in page.images:
        header, _, data = source.partition(",")
        assert header == "data:image/png;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (8, 6)
    for text in ("my ladder", "How many in picture", "asked for", "No problems found", "8 of 8 right"):
        assert text in page.text
    printed = capsys.readouterr().out
    assert "difficulty" in printed
    assert "No problems found." in printed


def test_questions_are_escaped_and_large_pictures_scaled_down(tmp_path: Path, make_sample: Any) -> None:
    image = Image.effect_noise((900, 600), 80).convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    hostile = "<script>alert(1)</script> & <b>bold</b>"
    content = [{"type": "image", "index": 0}, {"type": "text", "text": hostile}]
    sample = make_sample(messages=[{"role": "user", "content": content}])
    object.__setattr__(sample, "images", [StoredImage(buffer.getvalue(), "png")])
    write_ladder([sample], tmp_path / "ladder")
    inspect_ladder(tmp_path / "ladder", page=tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert hostile in page.text
    (picture,) = page.images
    assert Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))).size == (320, 213)
    assert len(text) < 100_000


def test_problems_are_named(ladder: Path, tmp_path: Path, make_sample: Any) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(ladder, damaged)
    shard = sorted(damaged.glob("*.tar"))[1]
    shard.write_bytes(shard.read_bytes().replace(b'"answer": "', b'"answer":  ', 1))
    for fault in ("shard_changed", "json_invalid"):
        problems = inspect(damaged).problems
        assert any("differs from its checksum" in problem for problem in problems)
        assert any(f"1 samples: {fault} (position " in problem for problem in problems)
        shard.with_name(f"{shard.name}.idx").unlink()  # the second time it is indexed as it is

    write_ladder([make_sample(n) for n in range(3)], tmp_path / "plain")
    assert "no sample has a difficulty" in " ".join(inspect(tmp_path / "plain").problems)

    backwards = [make_sample(n, difficulty=0.5, stage=stage) for n, stage in enumerate((0.5, 0.25, 0.25, 0.5))]
    same_level = [make_sample(n, difficulty=0.5, stage=0.5) for n in range(20, 50)]
    twice = [*backwards, make_sample(3, difficulty=1.0, stage=0.5), make_sample(9), *same_level]
    write_ladder(twice, tmp_path / "odd", built=MIXED)
    problems = inspect(tmp_path / "odd").problems
    for part in (
        "1 samples have the id of an earlier one",
        "1 samples have no difficulty",
        "the stage goes back 1 times",
        "stages 0, 0.125, 0.375, 0.625, 0.75, 0.875, 1 are empty",
        "stage 0.5 has 38% more of level 0.5 than the matrix asks for",
    ):
        assert any(part in problem for problem in problems), (part, problems)


def test_no_ladder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no shards"):
        inspect_ladder(tmp_path)
    with pytest.raises(ValueError, match=r"s3:/bucket/ladder is a URL, .* copy the ladder"):
        inspect_ladder(Path("s3://bucket/ladder"))
