"""Data sets as people have them: each preset on a file in its schema, own columns, folders, and long inputs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from observe_r1.experience import Prompt
from observe_r1.ladder.columns import Columns
from observe_r1.ladder.importers import import_ladder
from observe_r1.ladder.reader import LadderDataset


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=1000)
    return path


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def imported(path: Path, **options: Any) -> list[Prompt]:
    import_ladder(path, path.parent / "ladder", **options)
    prompts = list(LadderDataset(path.parent / "ladder"))
    assert all(isinstance(prompt, Prompt) for prompt in prompts)
    return prompts  # type: ignore[return-value]


def content(prompt: Prompt) -> list[Any]:
    """What the user says: texts, and the colours of pictures."""
    return [
        item["text"] if item["type"] == "text" else prompt.images[item["index"]].getpixel((0, 0))
        for item in prompt.messages[-1]["content"]
    ]


RED, BLUE = (255, 0, 0), (0, 0, 255)


class TestPresets:
    def test_geometry3k(self, tmp_path, encoded):
        rows = [
            {
                "images": [{"bytes": encoded("red"), "path": None}],
                "problem": "<image>Find x.",
                "answer": r"\frac{1}{2}",
            },
            {
                "images": [{"bytes": encoded("blue"), "path": "b.png"}, {"bytes": encoded("red"), "path": None}],
                "problem": "In <image> and <image>?",
                "answer": "3",
            },
        ]
        first, second = imported(write_parquet(tmp_path / "train-00000-of-00001.parquet", rows), source="geometry3k")
        assert (content(first), content(second)) == ([RED, "Find x."], ["In ", BLUE, " and ", RED, "?"])
        assert (first.id, first.source, first.gold.answer) == (
            "train-00000-of-00001-1",
            "geometry3k",
            r"\frac{1}{2}",
        )

    def test_virl39k(self, tmp_path, encoded):
        (tmp_path / "images").mkdir()
        (tmp_path / "images/p.png").write_bytes(encoded("blue"))

        def row(number, rate):
            return {
                "question": "<image>\nHow many?\nA. 1\nB. 2",
                "answer": r"\boxed{B}",
                "PassRate_32BTrained": 1.0,
                "PassRate_7BBase": rate,
                "category": "Math",
                "source": "Processed",
                "qid": f"q-{number}",
                "image": ["images/p.png"],
            }

        prompts = imported(write_parquet(tmp_path / "39Krelease.parquet", [row(0, 0.25), row(1, 1.0)]), mixing="none")
        assert [(prompt.id, prompt.difficulty) for prompt in prompts] == [("q-1", 0.0), ("q-0", 0.75)]
        assert content(prompts[0])[0] == BLUE
        from observe_r1.answers import fast_verdict

        assert fast_verdict(prompts[0].gold, "(B)") is True
        assert fast_verdict(prompts[0].gold, "A") is False

    def test_an_unknown_pass_rate_is_no_difficulty(self, tmp_path):
        rows = [{"question": "?a", "answer": "1", "qid": "a", "image": None, "PassRate_7BBase": -1.0}]
        assert imported(write_lines(tmp_path / "rows.jsonl", rows))[0].difficulty is None

    def test_a_pass_rate_of_decimals(self, tmp_path):
        rows = [{"question": "?a", "answer": "1", "qid": "a", "image": None, "PassRate_7BBase": Decimal("0.25")}]
        assert imported(write_parquet(tmp_path / "rows.parquet", rows))[0].difficulty == 0.75

    def test_mmk12(self, tmp_path, encoded):
        image = {"bytes": encoded("red"), "path": "1.png"}
        rows = [{"id": "k12-7", "question": "<image>What?", "answer": "A", "subject": "math", "image": image}]
        (prompt,) = imported(write_parquet(tmp_path / "rows.parquet", rows))
        assert (prompt.id, content(prompt), prompt.gold.answer) == ("k12-7", [RED, "What?"], "A")

    @pytest.mark.parametrize("stringified", [True, False])
    def test_mm_eureka(self, tmp_path, encoded, stringified):
        (tmp_path / "a.png").write_bytes(encoded("red"))
        chat: Any = [
            {"role": "system", "content": "Solve."},
            {
                "role": "user",
                "content": [{"type": "image", "image": "file://a.png"}, {"type": "text", "text": "What?"}],
            },
        ]
        row = {
            "id": "0",
            "conversations": json.dumps(chat) if stringified else chat,
            "answer": "$3$",
            "image_urls": ["file://a.png"],
        }
        (prompt,) = imported(write_lines(tmp_path / "dataset.jsonl", [row]))
        assert content(prompt) == [RED, "What?"]  # the picture once, though the row names it twice
        assert [message["role"] for message in prompt.messages] == ["system", "user"]

    def test_speakers_of_supervised_conversations(self, tmp_path, encoded):
        (tmp_path / "a.png").write_bytes(encoded("blue"))
        row = {
            "conversations": [{"from": "human", "value": "<image>What?"}],
            "answer": "3",
            "image_urls": ["a.png"],
        }
        assert content(imported(write_lines(tmp_path / "rows.jsonl", [row]))[0]) == [BLUE, "What?"]


class TestOwnColumns:
    def test_every_kind_of_name(self, tmp_path, encoded):
        rows = [
            {
                "prompt": "How wide?",
                "picture": {"bytes": encoded("red"), "path": None},
                "label": {"value": "2.50", "unit": "cm"},
                "options": '["2.5", "3"]',
                "key": 7,
                "hard": 0.5,
                "mean_tokens": 40.0,
            }
        ]
        columns = Columns(
            question="prompt",
            images="picture",
            answer="missing|label.value",
            unit="label.unit",
            choices="options",
            id="key",
            difficulty="hard",
            complexity="mean_tokens",
        )
        (prompt,) = imported(write_parquet(tmp_path / "rows.parquet", rows), columns=columns)
        assert (prompt.id, prompt.gold.answer, prompt.gold.unit, prompt.gold.choices) == (
            "7",
            "2.50",
            "cm",
            ("2.5", "3"),
        )
        assert (prompt.difficulty, prompt.complexity, content(prompt)) == (0.5, 40.0, [RED, "How wide?"])

    def test_on_the_command_line_and_in_a_file(self, tmp_path, command_line):
        write_lines(tmp_path / "rows.jsonl", [{"q": "How many?", "a": "3"}])
        (tmp_path / "columns.yaml").write_text("columns: {question: q, answer: a}\n")
        run = command_line(tmp_path)
        run("ladder", "import", "rows.jsonl", "one", "--columns.question=q", "--columns.answer=a")
        run("ladder", "import", "rows.jsonl", "two", "--config=columns.yaml")
        tars = [(tmp_path / name / "shard-000000.tar").read_bytes() for name in ("one", "two")]
        assert tars[0] == tars[1]

    def test_a_row_that_fits_nothing_says_what_it_has(self, tmp_path):
        source = write_lines(tmp_path / "rows.jsonl", [{"q": "How many?", "a": "3"}])
        with pytest.raises(ValueError, match="no message and no question among q, a"):
            import_ladder(source, tmp_path / "ladder")
        with pytest.raises(ValueError, match="problem: the row has q, a"):
            import_ladder(source, tmp_path / "ladder", format="geometry3k")

    def test_difficulties_can_be_left_for_the_builder(self, tmp_path):
        rows = [{"question": "?", "answer": "1", "difficulty": 1.0}, {"question": "?", "answer": "2"}]
        prompts = imported(write_lines(tmp_path / "rows.jsonl", rows), order="input")
        assert [prompt.gold.answer for prompt in prompts] == ["1", "2"]


class TestFolders:
    def test_pictures_beside_json_lines(self, tmp_path, encoded):
        folder = tmp_path / "my data"
        (folder / "pictures").mkdir(parents=True)
        (folder / "pictures/1.png").write_bytes(encoded("red"))
        write_lines(folder / "questions.jsonl", [{"question": "?", "answer": "1", "image": "pictures/1.png"}])
        (folder / "info.json").write_text('{"about": "this data set"}')
        (prompt,) = imported(folder)
        assert content(prompt) == [RED, "?"]

    def test_shards_of_parquet_below(self, tmp_path):
        for number in range(3):
            rows = [{"problem": f"?{number}", "answer": str(number)}]
            write_parquet(tmp_path / "set" / "data" / f"train-{number}.parquet", rows)
        assert [prompt.gold.answer for prompt in imported(tmp_path / "set")] == ["0", "1", "2"]

    def test_files_of_one_name_in_several_folders(self, tmp_path):
        """As data sets with several configurations have them; their rows bring no ids."""
        for subject in ("algebra", "geometry"):
            write_parquet(tmp_path / "set" / subject / "train-0.parquet", [{"question": f"{subject}?", "answer": "1"}])
        prompts = imported(tmp_path / "set")
        assert [prompt.id for prompt in prompts] == ["algebra/train-0-1", "geometry/train-0-1"]

    def test_pictures_beside_tables_further_down_or_at_the_top(self, tmp_path, encoded):
        for picture, colour in (("algebra/images/1", "red"), ("images/1", "lime"), ("images/top", "blue")):
            (tmp_path / "set" / picture).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "set" / f"{picture}.png").write_bytes(encoded(colour))
        row = {"question": "<image><image>?", "image": ["images/1.png", "images/top.png"], "answer": "1"}
        for subject in ("algebra", "geometry"):
            (tmp_path / "set" / subject).mkdir(exist_ok=True)
            write_lines(tmp_path / "set" / subject / "rows.jsonl", [row])
        for image_root in (None, tmp_path / "elsewhere"):
            first, second = (content(prompt) for prompt in imported(tmp_path / "set", image_root=image_root))
            assert [first[:2], second[:2]] == [[RED, BLUE], [(0, 255, 0), BLUE]]
            shutil.rmtree(tmp_path / "ladder")

    def test_an_empty_folder(self, tmp_path):
        (tmp_path / "set").mkdir()
        with pytest.raises(ValueError, match="holds no table"):
            import_ladder(tmp_path / "set", tmp_path / "ladder")


def test_a_file_that_is_no_parquet(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="cannot be read as parquet"):
        import_ladder(tmp_path / "rows.parquet", tmp_path / "ladder")


@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
def test_parquet_with_damaged_pages(tmp_path, compression):
    rows = pa.table({"question": [f"What is {number}?" for number in range(500)], "answer": ["3"] * 500})
    parquet.write_table(rows, tmp_path / "rows.parquet", compression=compression, use_dictionary=False)
    content = bytearray((tmp_path / "rows.parquet").read_bytes())
    for position in range(300, len(content) // 2, 7):
        content[position] ^= 0xFF
    (tmp_path / "rows.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"rows\.parquet cannot be read as parquet"):
        import_ladder(tmp_path / "rows.parquet", tmp_path / "ladder")


def test_one_text_that_is_not_utf8_costs_its_row(tmp_path):
    latin = "grün?".encode("latin-1")
    lengths = pa.array([0, 1, 1 + len(latin), 2 + len(latin)], pa.int32()).buffers()[1]
    questions = pa.StringArray.from_buffers(3, lengths, pa.py_buffer(b"?" + latin + b"?"))
    parquet.write_table(pa.table({"question": questions, "answer": ["1", "2", "3"]}), tmp_path / "rows.parquet")
    report = import_ladder(tmp_path / "rows.parquet", tmp_path / "ladder")
    assert (report.samples, report.skipped) == (2, {"field_invalid": 1})
    (skipped,) = (tmp_path / "ladder" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(skipped)["row"] == 2


def test_a_list_that_breaks_off_says_where(tmp_path):
    (tmp_path / "rows.json").write_text('[{"question": "?", "answer": "1"}, {"question": ')
    with pytest.raises(ValueError, match="cannot be parsed after row 1"):
        import_ladder(tmp_path / "rows.json", tmp_path / "ladder")
    assert not (tmp_path / "ladder").exists()


MEASURED = """
import sys
from pathlib import Path
from observe_r1.ladder import importers
importers.import_ladder(Path(sys.argv[1]), Path(sys.argv[2]))
print(*(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a process from /proc")
@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_memory_does_not_grow_with_the_input(tmp_path, kind):
    """Twenty times the rows, each of 2 kB: kept in memory they would take 40 MB more and, as Python objects, 60."""

    def peak(rows: int) -> int:
        table = [{"question": f"{n} " + "long " * 400, "answer": str(n), "difficulty": n % 9 / 8} for n in range(rows)]
        path = tmp_path / f"{rows}.{kind}"
        if kind == "parquet":
            write_parquet(path, table)
        elif kind == "json":
            path.write_text(json.dumps(table))
        else:
            write_lines(path, table)
        command = [sys.executable, "-c", MEASURED, str(path), str(tmp_path / f"ladder-{rows}")]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    small, large = peak(1_000), peak(20_000)
    assert large - small < 16_000, (small, large)  # kB
