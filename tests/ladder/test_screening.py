"""Which questions a ladder refuses: golds that judge nothing, questions seen before, questions of benchmarks."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from observe_r1.answers import Gold
from observe_r1.ladder.fingerprints import image_fingerprint, normalised_question
from observe_r1.ladder.images import StoredImage
from observe_r1.ladder.measurement import Measurement
from observe_r1.ladder.sample import BadSample
from observe_r1.ladder.screening import Contamination, ContaminationOptions, drop_known, screen
from observe_r1.ladder.selection import LabelNoiseOptions, noise_reasons
from observe_r1.rewards import AccuracyReward
from observe_r1.rewards.verification import Verdict


class AcceptsAnything(AccuracyReward):
    """The fault of the authors' release: a gold that does not parse makes every answer right."""

    def verdicts(self, pairs: Any) -> list[Verdict]:
        return [Verdict.CORRECT] * len(pairs)


def records(samples: list[Any], reward: AccuracyReward | None = None) -> list[dict[str, Any]]:
    reward = reward or AccuracyReward()
    found = screen(list(enumerate(samples)), reward)
    reward.close()
    return found


def noise(size: tuple[int, int] = (12, 9)) -> Image.Image:
    image = Image.new("RGB", size)
    image.putdata([(n * 7 % 256, n * 13 % 256, n * 29 % 256) for n in range(size[0] * size[1])])
    return image


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


class TestGolds:
    @pytest.mark.parametrize("answer", ["3", "dark red", "B", r"\sqrt{2}", r"\frac{\pi}{3}", "12 cm", r"[1,\infty)"])
    def test_a_sound_gold_stays(self, make_sample, answer):
        assert "reason" not in records([make_sample(answer=answer)])[0]

    def test_a_gold_that_is_not_equal_to_itself(self, make_sample):
        (record,) = records([make_sample(answer="9^{9^{9^9}}", answer_type="math")])
        assert record["reason"] == "gold_unparseable"

    def test_a_gold_that_accepts_anything(self, make_sample):
        (record,) = records([make_sample(answer="3")], AcceptsAnything())
        assert record["reason"] == "gold_accepts_wrong"
        assert "accepts" in record["detail"]

    def test_a_sample_that_cannot_be_read(self, make_sample):
        damaged = make_sample()
        object.__setattr__(damaged, "images", [StoredImage(damaged.images[0].data[:40], "png")])
        found = records([BadSample("shard_corrupt", "x"), damaged, make_sample(1)])
        assert [record.get("reason") for record in found] == ["shard_corrupt", "image_corrupt", None]


class TestFingerprints:
    def test_the_same_pixels_in_another_file(self):
        image = noise()
        same = {image_fingerprint(encode(image, "PNG")), image_fingerprint(encode(image, "WEBP", lossless=True))}
        same.add(image_fingerprint(encode(image, "PNG", compress_level=0)))
        assert len(same) == 1

    def test_other_pixels(self):
        image = noise()
        turned = image.transpose(Image.Transpose.ROTATE_180)
        reshaped = Image.frombytes("RGB", (9, 12), image.tobytes())
        assert len({image_fingerprint(encode(one, "PNG")) for one in (image, turned, reshaped)}) == 3

    @pytest.mark.parametrize(
        ("one", "other", "same"),
        [
            ("<image>\nFind  x.", "find x", True),
            ("<image 1> Find x:", "Find x ?", True),
            ("ｘ² = 4", "x2 = 4", True),  # NFKC folds widths and superscripts
            ("What is x + 1?", "What is x - 1?", False),
            ("Find x.", "Find y.", False),
        ],
    )
    def test_words(self, one, other, same):
        assert (normalised_question(one) == normalised_question(other)) is same


class TestKnownQuestions:
    def reasons(self, samples: list[Any], **options: Any) -> list[str | None]:
        known = drop_known(iter(records(samples)), Contamination(ContaminationOptions(**options)))
        return [record.get("reason") for record in known]

    def test_duplicates(self, make_sample):
        first = make_sample(1)
        again = make_sample(1, id="again", answer="1.0")
        other_answer, other_image = make_sample(1, id="b", answer="7"), make_sample(1, n_images=2, id="c")
        text_only = [make_sample(3, n_images=0, id="d"), make_sample(3, n_images=0, id="e")]
        samples = [first, again, other_answer, other_image, *text_only]
        assert self.reasons(samples) == [
            None,
            "contradicting_duplicate",
            "contradicting_duplicate",
            None,
            None,
            "duplicate",
        ]

    @pytest.mark.parametrize("kind", ["parquet", "jsonl", "folder"])
    def test_benchmarks_by_picture(self, tmp_path: Path, make_sample, kind):
        """As MathVista (parquet, `decoded_image`) and MMMU (`image_1`) have them, and as paths."""
        known, new = make_sample(1), make_sample(2, id="new")
        picture = known.images[0].data
        path = tmp_path / f"testmini.{kind}"
        if kind == "parquet":
            row = {"pid": "1", "question": "Other words?", "image": "images/1.jpg", "decoded_image": {"bytes": picture}}
            mmmu = {"id": "validation_1", "question": "?", "image_1": {"bytes": picture, "path": None}, "image_2": None}
            parquet.write_table(pa.Table.from_pylist([row]), path)
            parquet.write_table(pa.Table.from_pylist([mmmu]), tmp_path / "mmmu.parquet")
            assert self.reasons([known, new], benchmarks=[str(tmp_path / "mmmu.parquet")]) == ["contaminated", None]
        else:
            folder = path if kind == "folder" else tmp_path
            folder.mkdir(exist_ok=True)
            (folder / "1.png").write_bytes(encode(Image.open(io.BytesIO(picture)), "PNG", compress_level=0))
            row = {"question": "Other words?", "image": "1.png"}
            (folder / "rows.jsonl" if kind == "folder" else path).write_text(json.dumps(row))
        assert self.reasons([known, new], benchmarks=[str(path)]) == ["contaminated", None]
        assert self.reasons([known, new], benchmarks=[str(path)], match="both") == [None, None]

    def test_benchmarks_by_words(self, tmp_path: Path, make_sample):
        words = "How many of the shapes in this picture are red?"
        content = [{"type": "image", "index": 0}, {"type": "text", "text": words}]
        known = make_sample(1, messages=[{"role": "user", "content": content}])
        (tmp_path / "rows.jsonl").write_text(json.dumps({"question": f"<image>{words.upper()}"}))
        benchmarks = [str(tmp_path / "rows.jsonl")]
        assert self.reasons([known], benchmarks=benchmarks) == ["contaminated"]
        assert self.reasons([known], benchmarks=benchmarks, min_question_words=20) == [None]

    def test_a_benchmark_that_is_not_there(self, tmp_path: Path):
        with pytest.raises(ValueError, match=r"names .*no\.parquet, which does not exist"):
            Contamination(ContaminationOptions([str(tmp_path / "no.parquet")]))


class TestLabelNoise:
    MEASURED = (
        Measurement(0, [10] * 8),  # hard and brief
        Measurement(0, [90] * 8),  # hard
        Measurement(8, [10] * 8),  # brief
        Measurement(4, [90] * 8),
    )

    def test_both_readings(self):
        def reasons(drop: Any) -> list[str | None]:
            return noise_reasons(self.MEASURED, LabelNoiseOptions(drop, difficulty=1.0, complexity_tokens=50))

        assert reasons("both") == ["hard_and_brief", None, None, None]
        assert reasons("either") == ["hard", "hard", "brief", None]
        assert reasons("none") == [None] * 4

    def test_a_quantile_of_all_questions(self):
        measured = [Measurement(0, [n]) for n in range(1, 101)]
        dropped = noise_reasons(measured, LabelNoiseOptions(complexity_quantile=0.25))
        assert dropped.count("hard_and_brief") == 25
        assert dropped[24] == "hard_and_brief"
        assert dropped[25] is None

    def test_wrong_thresholds(self):
        with pytest.raises(ValueError, match=r"label_noise\.difficulty is 2; it lies in 0 … 1"):
            LabelNoiseOptions(difficulty=2)


def test_a_gold_keeps_its_options(make_sample):
    sample = make_sample(answer="2 cm", choices=("1 cm", "2 cm"))
    assert sample.gold == Gold("2 cm", choices=("1 cm", "2 cm"))
    assert "reason" not in records([sample])[0]
