"""Questions from parquet files in the published schemas."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from observe_r1.evaluation import MMMU, MathVista
from observe_r1.evaluation.parquet_benchmark import interleave


def text_of(content: list[dict[str, Any]]) -> str:
    return "".join(item.get("text", "[image]") for item in content)


def test_mathvista_questions(mathvista_directory: Path) -> None:
    benchmark = MathVista(str(mathvista_directory))
    assert [item.id for item in benchmark.items] == [str(number + 1) for number in range(23)]
    first = benchmark.items[0]
    assert (first.question_type, first.answer_type, len(first.choices)) == ("multi_choice", "text", 6)
    assert first.groups["skills"] == ["numeric commonsense"]
    assert set(first.groups) == {
        "question_type",
        "answer_type",
        "language",
        "source",
        "category",
        "task",
        "context",
        "grade",
        "skills",
    }
    for position in (0, 22, 7):  # over row groups, and back
        prompt = benchmark.prompt(position)
        assert prompt.id == str(position + 1)
        assert [image.size for image in prompt.images] == [(112, 112)]
        assert text_of(prompt.messages[0]["content"]).startswith("[image]")
        judged = benchmark.judge(benchmark.items[position], f"<answer>{benchmark.items[position].answer}</answer>")
        assert judged.strict.is_right
        assert judged.lenient.is_right


def test_mmmu_reads_both_layouts_alike(mmmu_directory: Path, merged_mmmu: Path) -> None:
    by_subject, merged = MMMU(str(mmmu_directory)), MMMU(str(merged_mmmu))
    assert by_subject.items == merged.items
    assert len(merged.items) == 21
    for position in range(21):
        one, other = by_subject.prompt(position), merged.prompt(position)
        assert one.messages == other.messages
        assert [image.tobytes() for image in one.images] == [image.tobytes() for image in other.images]


def test_mmmu_questions(merged_mmmu: Path) -> None:
    benchmark = MMMU(str(merged_mmmu.parent / "*.parquet"))
    kinds = [item.question_type for item in benchmark.items]
    assert {"multiple-choice", "open"} == set(kinds)
    assert any(isinstance(item.answer, list) for item in benchmark.items)
    (picture_option,) = (n for n, item in enumerate(benchmark.items) if item.id == "validation_Art_1")
    prompt = benchmark.prompt(picture_option)
    assert len(prompt.images) == 2
    text = text_of(prompt.messages[0]["content"])
    assert text.startswith("[image] What color")
    assert "\n(A) red\n(B) orange\n" in text
    assert text.endswith("(F) [image]\n\nAnswer with the option's letter from the given choices directly.")
    open_question = benchmark.prompt(kinds.index("open"))
    assert text_of(open_question.messages[0]["content"]).endswith(
        "?\nAnswer the question using a single word or phrase."
    )
    assert benchmark.items[0].groups == {
        "domain": ["Art and Design"],
        "subject": ["Art"],
        "question_type": ["multiple-choice"],
        "topic_difficulty": ["Easy"],
    }


@pytest.mark.parametrize(
    ("text", "numbers", "expected", "order"),
    [
        ("a <image 2> b <image 1>", [1, 2], "a [image] b [image]", [2, 1]),
        ("see <image 1>, again <image 1>", [1], "see [image], again <image 1>", [1]),
        ("no marker", [1, 2], "[image][image]no marker", [1, 2]),
        ("<image 1> and <image 3>", [1, 2], "[image][image] and <image 3>", [2, 1]),
        ("<image 1>", [], "<image 1>", []),
    ],
)
def test_pictures_stand_where_their_markers_are(text: str, numbers: list[int], expected: str, order: list[int]) -> None:
    messages, found = interleave(text, dict.fromkeys(numbers, "picture"))
    content = messages[0]["content"]
    assert (text_of(content), found) == (expected, order)
    assert [item["index"] for item in content if item["type"] == "image"] == list(range(len(order)))


def rewritten(source: Path, target: Path, change: Any) -> str:
    table = pq.read_table(source)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), target)
    return str(target)


def test_a_damaged_picture_is_named(merged_mmmu: Path, tmp_path: Path) -> None:
    def damage(rows: list[dict[str, Any]]) -> None:
        rows[1]["image_1"] = {"bytes": rows[1]["image_1"]["bytes"][:60], "path": None}
        rows[2]["image_1"] = {"bytes": None, "path": "elsewhere.png"}

    benchmark = MMMU(rewritten(merged_mmmu, tmp_path / "damaged.parquet", damage))
    with pytest.raises(ValueError, match="image_corrupt"):
        benchmark.prompt(1)
    with pytest.raises(ValueError, match=r"only the path 'elsewhere\.png'"):
        benchmark.prompt(2)
    assert benchmark.prompt(3).images
    with pytest.raises(ValueError, match="image_too_large"):
        MMMU(str(merged_mmmu), max_image_pixels=100).prompt(0)


def test_transparent_pictures_are_white_below(merged_mmmu: Path, tmp_path: Path) -> None:
    import io

    buffer = io.BytesIO()
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(buffer, format="PNG")

    def replace(rows: list[dict[str, Any]]) -> None:
        rows[0]["image_1"] = {"bytes": buffer.getvalue(), "path": None}

    (picture, _) = MMMU(rewritten(merged_mmmu, tmp_path / "clear.parquet", replace)).prompt(0).images
    assert picture.getpixel((5, 5)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda rows: rows[0].update(answer="?"), "no public answer"),
        (lambda rows: rows[0].update(answer="Z"), "'Z' of validation_Art_1"),
        (lambda rows: rows[0].update(id="validation_Cooking_1"), "Cooking"),
        (lambda rows: rows[0].update(options="['a', "), "published form"),
        (lambda rows: rows[0].update(options=None), "published form"),
        (lambda rows: rows.append(rows[0]), "twice"),
        (lambda rows: rows.clear(), "no rows"),
    ],
)
def test_data_in_another_form_are_refused(merged_mmmu: Path, tmp_path: Path, change: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=f"mmmu: .*{expected}"):
        _ = MMMU(rewritten(merged_mmmu, tmp_path / "other.parquet", change)).items


def test_missing_data_are_named(
    mathvista_directory: Path, merged_mmmu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "text.parquet").write_text("no parquet")
    for source, split, expected in (
        (str(mathvista_directory), "test", "no public answer"),
        (str(mathvista_directory), "train", r"no file train-\*\.parquet"),
        (str(tmp_path / "nowhere"), "testmini", "no file or directory"),
        (str(tmp_path / "*.json"), "testmini", "no file matches"),
        (str(tmp_path / "text.parquet"), "testmini", "no parquet file that can be read"),
        (str(merged_mmmu), "testmini", "has no column pid, query"),
        ("nobody/nothing-of-this-name", "testmini", "cannot be fetched from the hub"),
    ):
        with pytest.raises(ValueError, match=f"mathvista: .*{expected}"):
            _ = MathVista(source, split).items


def test_what_is_not_installed_is_named(mathvista_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing works without the extra; using it says what is missing."""
    benchmark = MathVista(str(mathvista_directory))
    item = benchmark.items[0]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "rapidfuzz.distance", None)
    with pytest.raises(ValueError, match=r"mathvista: .* pyarrow: pip install 'observe-r1\[eval\]'"):
        _ = MathVista(str(mathvista_directory)).items
    with pytest.raises(ValueError, match=r"rapidfuzz: pip install 'observe-r1\[eval\]'"):
        benchmark.judge(item, "no letter")
    assert benchmark.judge(item, "A").strict.prediction == item.choices[0]
