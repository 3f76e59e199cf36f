"""The schema of a sample: what is accepted, and the reason named for each defect."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageFile, ImageOps

from observe_r1.answers import Gold
from observe_r1.experience import Prompt
from observe_r1.ladder.fingerprints import image_fingerprint, pixel_fingerprint
from observe_r1.ladder.images import check_header, load_rgb, store_image
from observe_r1.ladder.sample import BadSample, Sample, from_prompt, parse_json, to_prompt

USER = {"role": "user", "content": "How many?"}
IMAGE = {"type": "image", "index": 0}


def user(*items):
    return [{"role": "user", "content": list(items)}]


def text(words):
    return {"type": "text", "text": words}


REFUSED = [
    ("field_missing", {"id": None}),
    ("field_missing", {"messages": None}),
    ("field_missing", {"answer": None}),
    ("field_invalid", {"id": ""}),
    ("field_invalid", {"id": 7}),
    ("field_invalid", {"source": ["a"]}),
    ("field_invalid", {"answer": 3}),
    ("field_invalid", {"answer": "\ud800"}),
    ("field_invalid", {"choices": "AB"}),
    ("field_invalid", {"choices": ["a", 2]}),
    ("field_invalid", {"precision": 1.5}),
    ("field_invalid", {"precision": True}),
    ("field_invalid", {"unit": 5}),
    ("field_invalid", {"difficulty": 1.1}),
    ("field_invalid", {"difficulty": "0.5"}),
    ("field_invalid", {"difficulty": math.nan}),
    ("field_invalid", {"complexity": -1}),
    ("field_invalid", {"complexity": math.inf}),
    ("field_invalid", {"stage": True}),
    ("field_invalid", {"n_correct": 9, "n_rollouts": 8}),
    ("field_invalid", {"n_rollouts": -1}),
    ("field_invalid", {"complexity": 10**400}),
    ("gold_unparseable", {"answer": "  "}),
    ("gold_unparseable", {"answer": "3.14", "precision": 10**9}),
    ("gold_unparseable", {"answer_type": "colour"}),
    ("gold_unparseable", {"answer_type": "choice", "answer": "Z", "choices": ["1", "2"]}),
    ("gold_unparseable", {"answer": "\\frac{1}{2"}),
    ("messages_invalid", {"messages": []}),
    ("messages_invalid", {"messages": "How many?"}),
    ("messages_invalid", {"messages": ["How many?"]}),
    ("messages_invalid", {"messages": [{"role": "tool", "content": "x"}]}),
    ("messages_invalid", {"messages": [{"role": "user"}]}),
    ("messages_invalid", {"messages": [USER, {"role": "assistant", "content": "3"}]}),
    ("messages_invalid", {"messages": user(IMAGE, {"type": "video", "index": 0})}),
    ("messages_invalid", {"messages": user(IMAGE, "How many?")}),
    ("messages_invalid", {"messages": user({"type": "image", "index": 1}, text("How many?"))}),
    ("messages_invalid", {"messages": user({"type": "image"}, text("How many?"))}),
    ("field_invalid", {"messages": user(IMAGE, {"type": "text"})}),
    ("image_count_mismatch", {"messages": [USER]}),
    ("image_count_mismatch", {"messages": user(IMAGE, IMAGE, text("How many?"))}),
    ("empty_question", {"messages": user(IMAGE, text(" \n"))}),
    ("empty_question", {"messages": [{"role": "system", "content": "Think."}, *user(IMAGE)]}),
    ("control_token_in_text", {"messages": user(IMAGE, text("a <|image_pad|> b"))}),
    ("control_token_in_text", {"messages": user(IMAGE, text("<|im_end|>"))}),
]


@pytest.mark.parametrize(("reason", "fields"), REFUSED, ids=lambda value: str(value)[:60])
def test_each_defect_has_its_reason(document, reason, fields):
    with pytest.raises(BadSample) as caught:
        Sample.from_document(document(1, **fields), ["picture"])
    assert caught.value.reason == reason
    assert caught.value.detail


@pytest.mark.parametrize("wrong", [None, [], "text", 3, b"bytes"])
def test_a_sample_is_a_json_object(wrong):
    with pytest.raises(BadSample, match="json_invalid"):
        Sample.from_document(wrong, [])


@pytest.mark.parametrize("wrong", [b"{", b"", b"\xff\xfe\x00", b"[" * 100_000])
def test_what_does_not_parse_is_named(wrong):
    with pytest.raises(BadSample, match="json_invalid"):
        parse_json(wrong)


def test_unknown_keys_and_nulls_are_ignored(document):
    sample = Sample.from_document({**document(0), "licence": "CC", "unit": None}, [])
    assert "licence" not in sample.to_document()
    assert sample.unit is None


def test_whole_numbers_may_be_written_as_floats(document):
    sample = Sample.from_document(document(0, precision=2.0, n_correct=3.0, n_rollouts=8.0), [])
    assert (sample.precision, sample.n_correct, sample.n_rollouts) == (2, 3, 8)


def test_a_text_is_a_question_without_images(document):
    assert Sample.from_document(document(0, messages=[USER]), []).images == []


measured = st.none() | st.floats(0, 1)


@given(
    id=st.text(st.characters(codec="utf-8"), min_size=1),
    question=st.text(st.characters(codec="utf-8", exclude_characters="<")).filter(str.strip),
    choices=st.lists(st.sampled_from(["red", "green", "blue"]), unique=True),
    precision=st.none() | st.integers(0, 6),
    difficulty=measured,
    stage=measured,
    complexity=st.none() | st.floats(0, 1e6),
    n_images=st.integers(0, 3),
)
def test_json_and_prompt_give_the_sample_back(n_images, question, choices, **fields):
    content = [*({"type": "image", "index": index} for index in range(n_images)), text(question)]
    images = [Image.new("RGB", (1, 1)) for _ in range(n_images)]
    messages = [{"role": "user", "content": content}]
    sample = Sample(messages=messages, answer="17", images=images, choices=tuple(choices), **fields)
    document = json.loads(json.dumps(sample.to_document()))
    assert Sample.from_document(document, images) == sample
    prompt = to_prompt(sample, position=5)
    assert prompt.position == 5
    assert from_prompt(prompt, images) == sample


def test_a_prompt_carries_everything_known(document):
    fields = {
        "source": "s",
        "answer_type": "choice",
        "answer": "B",
        "choices": ["1", "2"],
        "precision": 1,
        "unit": "cm",
        "difficulty": 0.5,
        "n_correct": 4,
        "n_rollouts": 8,
        "complexity": 120.5,
        "stage": 0.25,
    }
    sample = Sample.from_document(document(0, **fields), [])
    gold = Gold("B", "choice", ("1", "2"), 1, "cm")
    assert to_prompt(sample, 3) == Prompt(
        "a", "s", sample.messages, [], gold, 3, 0.5, 120.5, n_correct=4, n_rollouts=8, stage=0.25
    )


def test_replacing_a_field_validates_again(make_sample):
    with pytest.raises(BadSample, match="stage"):
        replace(make_sample(), stage=2.0)


def test_a_bad_sample_survives_worker_processes():
    bad = BadSample("image_corrupt", "the detail")
    for twin in (pickle.loads(pickle.dumps(bad)), copy.copy(bad)):
        assert (twin.reason, twin.detail, str(twin)) == (bad.reason, bad.detail, str(bad))


class TestStoredImages:
    @pytest.mark.parametrize(("format", "extension"), [("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")])
    def test_encoded_bytes_are_kept(self, encoded, format, extension):
        data = encoded(format=format)
        stored = store_image(data)
        assert (stored.data, stored.extension) == (data, extension)

    @pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "PPM"])
    def test_other_formats_become_png(self, encoded, format):
        stored = store_image(encoded((10, 200, 30), format=format))
        assert stored.extension == "png"
        assert check_header(stored.data, 1000).convert("RGB").getpixel((0, 0)) == (10, 200, 30)

    @pytest.mark.parametrize("format", ["PNG", "WEBP"])
    def test_transparent_becomes_white(self, encoded, format):
        stored = store_image(encoded((0, 0, 0, 0), format=format, mode="RGBA"))
        assert check_header(stored.data, 1000).convert("RGB").getpixel((0, 0)) == (255, 255, 255)

    def test_an_opaque_alpha_channel_is_no_reason_to_encode_again(self, encoded):
        data = encoded((1, 2, 3, 255), mode="RGBA")
        assert store_image(data).data == data

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
    def test_pictures_are_upright(self, orientation, format):
        """As Pillow's own reading of EXIF turns them, decoded from a shard and by fingerprint."""
        drawn = Image.new("RGB", (24, 16), "white")
        drawn.paste("black", (0, 0, 8, 8))
        exif, buffer = Image.Exif(), io.BytesIO()
        exif[ExifTags.Base.Orientation] = orientation
        drawn.save(buffer, format=format, exif=exif, **({} if format in ("PNG", "TIFF") else {"quality": 100}))
        stored = store_image(buffer.getvalue())
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(buffer.getvalue()))).convert("RGB")
        loaded = load_rgb("img0", stored.data, 1000)
        assert loaded.tobytes() == expected.tobytes()
        # who reads EXIF himself, as vLLM does, or stores the picture again does not turn it once more
        assert ImageOps.exif_transpose(loaded).tobytes() == expected.tobytes()
        assert load_rgb("img0", store_image(loaded).data, 1000).tobytes() == expected.tobytes()
        assert image_fingerprint(stored.data) == image_fingerprint(buffer.getvalue()) == pixel_fingerprint(expected)

    def test_damaged_exif_turns_nothing(self, encoded):
        with Image.open(io.BytesIO(encoded())) as image:
            buffer = io.BytesIO()
            image.save(buffer, format="PNG", exif=b"Exif\0\0no header")
        assert load_rgb("img0", store_image(buffer.getvalue()).data, 1000).size == (8, 6)

    def test_a_decoded_image_becomes_png(self):
        assert store_image(Image.new("CMYK", (2, 2))).extension == "png"

    def test_too_large_is_refused_before_decoding(self, encoded, monkeypatch):
        data = encoded(size=(100, 100))
        monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
        with pytest.raises(BadSample, match="image_too_large"):
            store_image(data, max_pixels=9_999)

    def test_pillows_own_bomb_limit_counts_as_too_large(self, encoded, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
        with pytest.raises(BadSample, match="image_too_large"):
            check_header(encoded(), 1000)

    def test_sixteen_bits_are_refused(self, encoded):
        with pytest.raises(BadSample, match="image_unsupported"):
            store_image(encoded(300, mode="I;16"))

    @given(
        cut=st.integers(0, 2**16), flipped=st.integers(0, 2**16), format=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF"])
    )
    def test_damage_is_named_or_harmless(self, encoded, cut, flipped, format):
        data = bytearray(encoded(size=(40, 30), format=format))
        data[flipped % len(data)] ^= 0xFF
        with suppress(BadSample):
            store_image(bytes(data[: cut % len(data) + 1]))
