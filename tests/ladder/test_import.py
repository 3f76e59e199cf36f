"""Importing the user's questions: every accepted form, every reason to skip a row, and the order that results."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections import Counter
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from io import BytesIO
from pathlib import Path
from urllib.parse import quote

import pytest

from observe_r1.experience import Prompt
from observe_r1.ladder import addresses, importers
from observe_r1.ladder.addresses import read_image
from observe_r1.ladder.importers import import_ladder
from observe_r1.ladder.index import open_index
from observe_r1.ladder.manifest import Manifest
from observe_r1.ladder.reader import LadderDataset, read_members
from observe_r1.ladder.rows import sample_of
from observe_r1.ladder.sample import BadSample
from observe_r1.ladder.tables import read_json


def chat(*images: str, text: str = "How many?") -> list[dict]:
    items = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*items, {"type": "text", "text": text}]}]


def release_row(*images: str, answer: str = "$3$", **fields) -> dict:
    return {"message": json.dumps(chat(*images)), "answer": answer, **fields}


def write_lines(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture
def picture(tmp_path, encoded):
    """An image file; its bytes are those of `encoded("blue", format="JPEG")`."""
    path = tmp_path / "a picture.jpg"
    path.write_bytes(encoded("blue", format="JPEG"))
    return path


def skipped_rows(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "skipped.jsonl").read_text().splitlines()]


class TestRoundTrip:
    def rows(self, picture, encoded):
        data_url = "data:image/png;base64," + base64.b64encode(encoded("red")).decode()
        return [
            release_row(f"file://{picture}", id="stringified", source="geo"),
            {"messages": chat(picture.name), "answer": 4, "id": 17, "answer_type": "number"},
            release_row(data_url, answer="B", choices=["1", "2"], precision=2.0, unit="cm"),
            {
                "message": [{"role": "user", "content": "<image>Two<image>?"}],
                "images": [str(picture), data_url],
                "answer": "2",
            },
        ]

    @pytest.mark.parametrize("as_list", [False, True])
    def test_every_form_of_row(self, tmp_path, picture, encoded, as_list):
        rows = self.rows(picture, encoded)
        source = tmp_path / "rows.json"
        source.write_text("\ufeff \n" + json.dumps(rows, indent=1), encoding="utf-8") if as_list else write_lines(
            source, rows
        )
        report = import_ladder(source, tmp_path / "ladder")
        prompts = list(LadderDataset(tmp_path / "ladder"))
        assert all(isinstance(prompt, Prompt) for prompt in prompts)
        assert (report.samples, report.held_out, report.skipped, report.order) == (4, 0, Counter(), "input")
        assert [prompt.id for prompt in prompts] == ["stringified", "17", "rows-3", "rows-4"]
        assert [prompt.gold.answer for prompt in prompts] == ["$3$", "4", "B", "2"]
        assert prompts[0].source == "geo"
        assert (prompts[2].gold.choices, prompts[2].gold.precision, prompts[2].gold.unit) == (("1", "2"), 2, "cm")
        assert prompts[3].messages[0]["content"] == [
            {"type": "image", "index": 0},
            {"type": "text", "text": "Two"},
            {"type": "image", "index": 1},
            {"type": "text", "text": "?"},
        ]

    def test_local_files_keep_their_bytes(self, tmp_path, picture):
        import_ladder(write_lines(tmp_path / "rows.jsonl", [release_row(str(picture))]), tmp_path / "ladder")
        tar = tmp_path / "ladder" / "shard-000000.tar"
        assert read_members(tar, open_index(tar).spans[0])["img0.jpg"] == picture.read_bytes()

    def test_two_imports_give_the_same_bytes(self, tmp_path, picture):
        rows = [release_row(str(picture), difficulty=number % 9 / 8) for number in range(30)]
        source = write_lines(tmp_path / "rows.jsonl", [*rows, "{"])
        digests = []
        for name in ("one", "two"):
            import_ladder(source, tmp_path / name, holdout=5, samples_per_shard=8)
            files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
            digests.append([(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files])
        assert digests[0] == digests[1]
        assert not list(tmp_path.rglob("staging"))

    def test_limit_counts_rows(self, tmp_path):
        source = write_lines(tmp_path / "rows.jsonl", ["{", *(release_row() for _ in range(5))])
        assert import_ladder(source, tmp_path / "ladder", limit=3).samples == 2

    def test_the_system_prompt_is_replaced_or_kept(self, tmp_path):
        messages = [{"role": "system", "content": "Old."}, *chat()]
        source = write_lines(tmp_path / "rows.jsonl", [{"messages": messages, "answer": "1"}])

        def system(name, **options):
            import_ladder(source, tmp_path / name, **options)
            return LadderDataset(tmp_path / name)[0].messages[0]["content"]

        assert system("new", system_prompt="New.") == "New."
        assert system("kept") == [{"type": "text", "text": "Old."}]

    def test_the_closing_table_and_the_order_are_reported(self, tmp_path, capsys):
        import_ladder(write_lines(tmp_path / "rows.jsonl", [release_row(), "{"]), tmp_path / "ladder")
        shown = capsys.readouterr().err
        assert "skipped: json_invalid" in shown
        assert "keep the order of the input" in shown


class TestOrder:
    def import_levels(self, tmp_path, levels, **options):
        rows = [
            release_row(id=f"{number:03d}", difficulty=level, complexity=100 - number)
            for number, level in enumerate(levels)
        ]
        return import_ladder(write_lines(tmp_path / "rows.jsonl", rows), tmp_path / "ladder", **options)

    def test_difficulty_orders_the_ladder(self, tmp_path):
        report = self.import_levels(tmp_path, [1, 0, 0.5, 0.5], mixing="none")
        assert report.order == "curriculum"
        assert [prompt.id for prompt in LadderDataset(tmp_path / "ladder")] == ["001", "003", "002", "000"]

    def test_mixing_writes_the_stage_into_the_sample(self, tmp_path):
        self.import_levels(tmp_path, [number % 9 / 8 for number in range(90)])
        prompts = list(LadderDataset(tmp_path / "ladder"))
        stages = [prompt.stage for prompt in prompts]
        assert stages == sorted(stages)
        assert len(set(stages)) > 5
        assert Manifest.load(tmp_path / "ladder").built["mixing"]["levels"][1] == 0.125
        assert Manifest.load(tmp_path / "ladder").levels["0.125"] == 10

    def test_difficulty_follows_from_counts(self, tmp_path):
        rows = [release_row(n_correct=2, n_rollouts=8), release_row(n_correct=8, n_rollouts=8)]
        import_ladder(write_lines(tmp_path / "rows.jsonl", rows), tmp_path / "ladder")
        assert LadderDataset(tmp_path / "ladder").difficulties == [0, 0.75]

    def test_rows_without_difficulty_among_others(self, tmp_path):
        source = write_lines(tmp_path / "rows.jsonl", [release_row(difficulty=0.5), release_row()])
        assert import_ladder(source, tmp_path / "ladder").skipped == {"difficulty_missing": 1}
        assert skipped_rows(tmp_path / "ladder")[0]["row"] == 2

    @pytest.mark.parametrize("levels", [[number % 4 / 8 for number in range(40)], [None] * 40])
    def test_the_held_out_part(self, tmp_path, levels):
        report = self.import_levels(tmp_path, levels, holdout=8, seed=3)
        ladder, held_out = LadderDataset(tmp_path / "ladder"), LadderDataset(tmp_path / "ladder" / "held_out")
        assert (report.samples, report.held_out) == (len(ladder), len(held_out)) == (32, 8)
        assert {prompt.id for prompt in [*ladder, *held_out]} == {f"{number:03d}" for number in range(40)}
        assert set(Counter(held_out.difficulties).values()) == ({8} if levels[0] is None else {2})

    def test_too_much_held_out(self, tmp_path):
        with pytest.raises(ValueError, match="cannot hold out 2 of 2"):
            self.import_levels(tmp_path, [0, 1], holdout=2)
        assert not (tmp_path / "ladder").exists()


WORDS = {"type": "text", "text": "How many?"}

SKIPPED = [
    ("json_invalid", '{"answer": '),
    ("json_invalid", "[1]"),
    ("json_invalid", {"message": "[{", "answer": "3"}),
    ("field_missing", {"answer": "3"}),
    ("field_missing", {"message": chat()}),
    ("field_invalid", {**release_row(), "difficulty": 2}),
    ("field_invalid", {**release_row(), "answer": ["3"]}),
    ("field_invalid", release_row(n_correct=3, n_rollouts="8")),
    ("field_invalid", {"qid": "a", "question": "?", "answer": "3", "PassRate_7BBase": "0.5"}),
    ("messages_invalid", {"conversations": [{"from": ["human"], "value": "?"}], "answer": "3"}),
    ("messages_invalid", {"message": "{}", "answer": "3"}),
    ("messages_invalid", {"message": [{"role": "user", "content": 3}], "answer": "3"}),
    ("messages_invalid", {"message": chat(" "), "answer": "3"}),
    ("messages_invalid", {**release_row(), "images": [{"bytes": "x"}]}),
    ("empty_question", {"message": chat(text=" "), "answer": "3"}),
    ("control_token_in_text", {"message": chat(text="<|image_pad|>?"), "answer": "3"}),
    ("gold_unparseable", release_row(answer="\\frac{1}{2")),
    ("gold_unparseable", release_row(answer="$ $")),
    ("image_count_mismatch", {"message": [{"role": "user", "content": [{"type": "image"}, WORDS]}], "answer": "3"}),
    ("image_count_mismatch", {"message": [{"role": "user", "content": "<image>?"}], "answer": "3"}),
    (
        "image_count_mismatch",
        {"message": [{"role": "user", "content": "<image>?"}], "images": ["good.png", "good.png"], "answer": "3"},
    ),
    ("image_missing", release_row("file:///no/such/file.png")),
    ("image_missing", release_row("http://127.0.0.1:9/closed.png")),
    ("image_missing", release_row("data:nonsense")),
    ("image_missing", release_row("http://127.0.0.1:9/with a space.png")),
    ("image_missing", release_row("iVBORw0KGgo" * 100)),
    ("image_corrupt", release_row("broken.png")),
    ("image_corrupt", release_row("data:image/png;base64,AAAA")),
    ("image_too_large", release_row("large.png")),
    ("image_unsupported", release_row("deep.png")),
    ("image_count_mismatch", {"message": chat("good.png", text="<image> and <image>?"), "answer": "3"}),
    ("image_count_mismatch", {"message": [{"role": "system", "content": "x"}], "images": ["good.png"], "answer": "3"}),
    ("id_duplicate", release_row(id="good")),
]


class TestSkippedRows:
    def test_each_row_is_listed_with_its_reason(self, tmp_path, encoded):
        (tmp_path / "good.png").write_bytes(encoded())
        (tmp_path / "broken.png").write_bytes(encoded()[:40])
        (tmp_path / "large.png").write_bytes(encoded(size=(50, 50)))
        (tmp_path / "deep.png").write_bytes(encoded(9, mode="I;16"))
        rows = [release_row("good.png", id="good"), "", *(row for _, row in SKIPPED)]
        report = import_ladder(write_lines(tmp_path / "rows.jsonl", rows), tmp_path / "ladder", max_image_pixels=2000)
        listed = skipped_rows(tmp_path / "ladder")
        assert [(entry["row"], entry["reason"]) for entry in listed] == [
            (number, reason) for number, (reason, _) in enumerate(SKIPPED, start=3)
        ]
        assert all(entry["detail"] for entry in listed)
        assert report.skipped == Counter(reason for reason, _ in SKIPPED)
        assert report.samples == 1
        assert Manifest.load(tmp_path / "ladder").built["skipped"] == report.skipped

    def test_nothing_remains(self, tmp_path):
        source = write_lines(tmp_path / "rows.jsonl", [release_row("no.png"), release_row("no.png"), "{"])
        with pytest.raises(
            ValueError, match=r"no row of .*rows\.jsonl can be used: 2 image_missing \(row 1: .*1 json_inv"
        ):
            import_ladder(source, tmp_path / "ladder")
        assert not (tmp_path / "ladder").exists()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]

    @pytest.mark.parametrize("content", ["", "[]", "\n\n"])
    def test_no_rows(self, tmp_path, content):
        (tmp_path / "rows.json").write_text(content)
        with pytest.raises(ValueError, match="it has no rows"):
            import_ladder(tmp_path / "rows.json", tmp_path / "ladder")

    def test_a_broken_list(self, tmp_path):
        (tmp_path / "rows.json").write_text('[{"answer": ')
        with pytest.raises(ValueError, match="starts as a JSON list but cannot be parsed"):
            import_ladder(tmp_path / "rows.json", tmp_path / "ladder")

    @pytest.mark.parametrize(
        ("options", "message"),
        [({"limit": 0}, "limit is 0"), ({"mixing": "all"}, "mixing is 'all'"), ({"holdout": -1}, "holdout is -1")],
    )
    def test_wrong_options(self, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            import_ladder(tmp_path / "rows.json", tmp_path / "ladder", **options)

    def test_no_input(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            import_ladder(tmp_path / "rows.json", tmp_path / "ladder")

    def test_images_are_not_fetched_for_a_row_that_is_refused_anyway(self, tmp_path):
        with pytest.raises(BadSample, match="gold_unparseable"):
            sample_of(release_row("file:///no/such.png", answer="\\frac{"), "id", [tmp_path])


class TestPlacesOfImages:
    """What the content of two user messages becomes: texts, and numbers for images."""

    @pytest.mark.parametrize(
        ("first", "second", "column", "placed"),
        [
            ("A", "B", ["x", "y"], [["x", "y", "A"], ["B"]]),
            ("<image>A", "B<image><image>", ["x", "y", "z"], [["x", "A"], ["B", "y", "z"]]),
            ([{"type": "image"}, {"type": "text", "text": "A"}], "B<image>", ["x", "y"], [["x", "A"], ["B", "y"]]),
            ([{"type": "text", "text": "A"}, {"type": "image", "text": None}], "B", ["x"], [["A", "x"], ["B"]]),
            (
                [{"type": "image", "image": "p"}, {"type": "text", "text": "A <image>."}],
                "B",
                [],
                [["A ", "p", "."], ["B"]],
            ),
            ([{"type": "image", "image": "p"}, {"type": "text", "text": "A"}], "B", ["x"], [["x", "p", "A"], ["B"]]),
            (
                [{"type": "image_url", "image_url": {"url": "p"}}, {"type": "text", "text": "A"}],
                "B",
                [],
                [["p", "A"], ["B"]],
            ),
        ],
    )
    def test_column_items_and_markers(self, tmp_path, encoded, first, second, column, placed):
        colors = {"p": 10, "x": 20, "y": 30, "z": 40}
        for name, color in colors.items():
            (tmp_path / name).write_bytes(encoded(color, mode="L"))
        messages = [{"role": "user", "content": content} for content in (first, second)]
        sample = sample_of({"messages": messages, "images": column, "answer": "1"}, "id", [tmp_path])
        named = {encoded(color, mode="L"): name for name, color in colors.items()}
        names = [named[image.data] for image in sample.images]
        found = [
            [item["text"] if item["type"] == "text" else names[item["index"]] for item in message["content"]]
            for message in sample.messages
        ]
        assert found == placed


def test_golds_that_math_verify_cannot_compare_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(
        importers, "gold_problems", lambda golds, _: ["hostile" if gold.answer == "x^2" else None for gold in golds]
    )
    monkeypatch.setattr(importers, "GOLDS_PER_BATCH", 2)
    rows = [release_row(answer=answer, difficulty=0.5) for answer in ("1", "x^2", "2", "3", "x^2")]
    report = import_ladder(write_lines(tmp_path / "rows.jsonl", rows), tmp_path / "ladder")
    assert (report.samples, report.skipped) == (3, {"gold_unparseable": 2})
    assert [entry["row"] for entry in skipped_rows(tmp_path / "ladder")] == [2, 5]
    source = write_lines(tmp_path / "none.jsonl", [release_row(answer="x^2")])
    with pytest.raises(ValueError, match="can be used: 1 gold_unparseable"):
        import_ladder(source, tmp_path / "empty")


def test_math_verify_itself_accepts_a_formula(tmp_path):
    rows = [release_row(answer=r"$\sqrt{2}+x$"), release_row(answer="3")]
    assert import_ladder(write_lines(tmp_path / "rows.jsonl", rows), tmp_path / "ladder").samples == 2


class TestAddresses:
    def test_where_a_file_is_looked_up(self, tmp_path):
        beside, root = tmp_path / "data", tmp_path / "root"
        for directory in (beside, root):
            (directory / "images").mkdir(parents=True)
            (directory / "images" / "x y.png").write_bytes(directory.name.encode())
        look_up = partial(read_image, directories=[tmp_path / "nowhere", beside])
        assert look_up("images/x y.png") == b"data"
        assert look_up("file://images/x y.png") == b"data"
        assert look_up(f"file://{quote(str(beside))}/images/x%20y.png") == b"data"
        assert look_up("images/x y.png", image_root=root) == b"root"
        assert look_up("file:///images/x y.png", image_root=root) == b"root"
        assert look_up(str(beside / "images/x y.png"), image_root=root) == b"data"
        with pytest.raises(BadSample, match=r"no file .*root/z\.png or .*nowhere/z\.png or .*data/z\.png"):
            look_up("z.png", image_root=root)

    @pytest.fixture
    def server(self, tmp_path, monkeypatch):
        monkeypatch.setenv("no_proxy", "127.0.0.1")

        class Quiet(SimpleHTTPRequestHandler):
            def log_message(self, *_):
                pass

        with HTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            yield f"http://127.0.0.1:{server.server_port}"
            server.shutdown()
            thread.join()

    def test_download(self, tmp_path, server, picture, monkeypatch):
        address = f"{server}/{quote(picture.name)}"
        assert read_image(address, [tmp_path]) == picture.read_bytes()
        with pytest.raises(BadSample, match=r"image_missing.*404"):
            read_image(f"{server}/no.png", [tmp_path])
        monkeypatch.setattr(addresses, "MAX_BYTES", 10)
        with pytest.raises(BadSample, match="image_too_large"):
            read_image(address, [tmp_path])


@pytest.mark.parametrize("size", [0, 3])
def test_rows_are_numbered_as_an_editor_does(size):
    lines = b"\n" * size + b'{"a": 1}\n\n{\n'
    numbers = [(number, isinstance(row, BadSample)) for number, row in read_json(BytesIO(lines))]
    assert numbers == [(size + 1, False), (size + 3, True)]
