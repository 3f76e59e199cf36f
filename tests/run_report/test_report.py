"""The page of a run: whole, resumed, going on, damaged, hostile; read as HTML and in a browser."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image

from observe_r1.masking import masked, masked_text
from observe_r1.run_report.charts import MOST_POINTS, line_chart, thin
from observe_r1.run_report.config import compare
from observe_r1.run_report.page import page
from observe_r1.run_report.pictures import Pictures
from observe_r1.run_report.report import report_run
from observe_r1.run_report.run import read_run
from observe_r1.run_report.scalars import Series, read_scalars
from observe_r1.run_report.tagged_text import tagged_parts

Browser = Callable[..., Any]
HOSTILE = (
    '</script><script>window.hacked = 1</script><img src=x onerror=\'window.hacked = 2\'>" onload="hacked=3" & <b>'
)


def text_of(html: str) -> str:
    """What a reader sees."""
    body = re.sub(r"<script.*?</script>|<style.*?</style>", "", html, flags=re.DOTALL)
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]*>", " ", body)))


def log(logger: Any, first: int, last: int, value: float = 0.5) -> None:
    """Figures as a training logs them."""
    for step in range(first, last):
        figures = {"train/kl": 0.01 * step, "train/entropy": 0.1, "rollout/wasted_groups": 0.25, "lr-AdamW": 1e-4}
        logger.log_metrics(figures | {"rollout/reward": value, "rollout/pass_rate": value}, step)
        logger.log_metrics({"seconds/generate": 2.0, "seconds/train": 3.0, "pass_rate_by_level/0.500": value}, step)
        if step % 10 == 0:
            logger.log_metrics({"val/pass_rate": value, "val/pass_rate_by_level/0.500": value, "epoch": 0}, step)
    logger.save()
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.flush()


def answer(step: int, name: str, text: str, correct: bool, images: list[str], **more: Any) -> dict[str, Any]:
    parts = {"reward/format": 1.0, "reward/accuracy": float(correct), "reward": 0.5 + correct}
    known = {"step": step, "id": name, "position": 3, "difficulty": 0.5, "question": f"What is {name}?", "gold": "4"}
    return {**known, **parts, "images": images, "completion": text, "tokens": 9, "truncated": False,
            "correct": correct, "advantage": 0.5, "weight": 1.0, **more}  # fmt: skip


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(root: Path, version: str = "version_0", first: int = 0, last: int = 41, value: float = 0.5) -> Path:
    """A run directory with everything in it."""
    logger = TensorBoardLogger(root, "runs", version, default_hp_metric=False)
    run = Path(logger.log_dir)
    log(logger, first, last, value)
    (run / "completions/images").mkdir(parents=True)
    Image.effect_noise((60, 40), 50).convert("RGB").save(run / "completions/images/a.png")
    tagged = "<observe>two dots</observe><think>2+2</think><answer>{}</answer>"
    write_lines(
        run / "completions/completions.jsonl",
        [
            answer(step, f"q{question}", tagged.format(said), said == 4, ["a.png"])
            for step in range(first, last, 10)
            for question in range(3)
            for said in (3, 4)
        ],
    )
    write_lines(
        run / "completions/held_out.jsonl",
        [answer(s, "held", tagged.format(s), s > 15, ["a.png"]) for s in range(first, last, 10)],
    )
    shutil.copy(Path(__file__).parent.parent.parent / "configs/quickstart.yaml", run / "config.yaml")
    summary = {
        "status": "finished", "pass_rate": {"before": 0.5, "after": 0.75}, "validations": [], "seed": 7,
        "optimizer_steps": last, "seconds": {"total": 100.0, "generate": 40.0, "train": 50.0},
        "skipped": {"train": {"image_corrupt": 3}, "held_out": {}}, "shards_with_problems": {},
        "verdicts": {"train": {"correct": 5}}, "versions": {"torch": "2.13.0"},
        "health": [{"name": "kl_blow_up", "step": 20, "message": "KL is 9.", "advice": "Lower it.", "until": 30}],
    }  # fmt: skip
    (run / "summary.json").write_text(json.dumps(summary))
    score = {"accuracy": 0.5, "low": 0.4, "high": 0.6, "correct": 5, "total": 10}
    report = {"benchmark": "mathvista", "questions": 10, "refused": 1, "length": 30.0, "format_rate": 1.0,
              "truncation_rate": 0.0, "scores": {"strict": {"overall": score}}}  # fmt: skip
    (run / "evaluation/mathvista").mkdir(parents=True)
    for step in (0, 40):
        (run / f"evaluation/mathvista/step-{step:06d}.json").write_text(json.dumps(report))
    Image.effect_noise((900, 300), 50).save(run / "evaluation/mathvista/step-000040.png")
    return run


def test_everything_is_shown_in_a_browser(tmp_path: Path, browser: Browser) -> None:
    run = make_run(tmp_path)
    report_run(run)
    for scheme in ("light", "dark"):
        found = browser(run / "report.html", scheme, 1200, 400)
        assert found["console"] == []
        assert found["requests"] == [(run / "report.html").as_uri()]
        for seen, width in zip(found["seen"], (1200, 400), strict=True):
            assert seen["dark"] == (scheme == "dark")
            assert seen["scroll"] <= width
            sections = dict(seen["sections"])
            assert sections.keys() == {
                "health", "learning", "levels", "held_out", "completions", "benchmarks", "policy", "waste", "time",
                "samples", "config", "versions",
            }  # fmt: skip
            assert min(sections.values()) > 40
            assert len(seen["pictures"]) == 1 + 4 * 3 + 1
            assert all(size > 0 and alt and source == "data:image/" for size, alt, source in seen["pictures"])
            assert len(seen["charts"]) == 7
            assert all(height > 100 and ("at step" in said or "Shares" in said) for height, said in seen["charts"])
            assert seen["worst"][0][0] >= 4.5, seen["worst"]  # contrast of text, WCAG AA
            assert re.match(r"step (18|19|20|21|22)held-out, greedy: 0.5", seen["shown"]), seen["shown"]
            for part in ("50.0% → 75.0% (+25.0 points)", "kl_blow_up", "image_corrupt", "two dots", "50.0 %", "2.13.0"):
                assert part in seen["text"], part


def test_what_users_and_models_wrote_is_shown_and_never_run(tmp_path: Path, browser: Browser) -> None:
    run = make_run(tmp_path)
    images = ["a.png", "../../../etc/passwd"]
    hostile = [answer(s, HOSTILE, HOSTILE, False, images, gold=HOSTILE, question=HOSTILE) for s in (0, 40)]
    write_lines(run / "completions/completions.jsonl", hostile)
    write_lines(run / "completions/held_out.jsonl", hostile)
    summary = json.loads((run / "summary.json").read_text())
    health = [{"name": HOSTILE, "step": HOSTILE, "message": HOSTILE, "advice": HOSTILE}, "odd", {}]
    summary |= {"status": HOSTILE, "seed": HOSTILE, "health": health, "versions": {HOSTILE: HOSTILE}}
    summary |= {"skipped": {HOSTILE: {HOSTILE: HOSTILE}}, "shards_with_problems": {HOSTILE: {HOSTILE: HOSTILE}}}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "config.yaml").write_text(json.dumps({"model": {"policy": {"pretrained": HOSTILE}}, "note": HOSTILE}))
    logger = TensorBoardLogger(tmp_path, "runs", "version_0", default_hp_metric=False)
    for step in (41, 42):
        logger.log_metrics({f"reward/{HOSTILE}": 1.0, HOSTILE: 2.0}, step)
    logger.experiment.flush()
    report_run(run)
    found = browser(run / "report.html", "light", 400)
    (seen,) = found["seen"]
    assert (seen["hacked"], found["console"], len(found["requests"])) == (None, [], 1)
    assert seen["text"].count("window.hacked = 1") > 15
    assert seen["scroll"] <= 400
    assert "root:" not in seen["text"]


def test_a_run_with_anything_missing_or_damaged(tmp_path: Path) -> None:
    """Every file deleted, cut in the middle and filled with noise, one at a time."""
    run = make_run(tmp_path, last=21)
    whole = text_of(page(read_run(run)))
    assert "What is missing" not in whole
    noise = random.Random(0).randbytes(5000)
    for path in sorted(path for path in run.rglob("*") if path.is_file() and path.name != "hparams.yaml"):
        content = path.read_bytes()
        for damage in (None, content[: len(content) // 2], noise, *([b"[1, 2]"] if path.suffix == ".json" else [])):
            path.unlink(missing_ok=True) if damage is None else path.write_bytes(damage)
            text = text_of(page(read_run(run)))
            expected = {"config.yaml": "Config", "summary.json": "Summary", "a.png": "missing or broken"}
            if damage is None and path.name in expected:
                assert expected[path.name] in text
            if path.name == "held_out.jsonl" and damage == content[: len(content) // 2]:
                assert "Completions: 1 lines could not be read" in text
        path.write_bytes(content)
    assert text_of(page(read_run(run))) == whole


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, "runs", default_hp_metric=False)
    log(logger, 0, 25, 0.5)
    run = read_run(Path(logger.log_dir))
    assert run.scalars.last_written is not None
    text = text_of(page(run, now=run.scalars.last_written + 200))
    for part in (
        "no summary: goes on, or was ended from outside. Last figures 3 min 20 s ago",
        "there is no summary.json",
        "there is no config.yaml",
        "Completions: there are none",
        "50.0% → 50.0% (+0.0 points, at step 20)",
        "Optimizer steps 25",
    ):
        assert part in text, part


def test_a_resumed_run_is_shown_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 1 goes on from step 20 of version 0, which had come to step 40; its checkpoint path is relative."""
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path, "version_0", 0, 41, value=0.25)
    later = make_run(tmp_path, "version_1", 20, 61, value=0.75)
    with (later / "config.yaml").open("a") as file:
        file.write("ckpt_path: runs/version_0/checkpoints/last.ckpt\n")
    run = read_run(Path("runs/version_1"))
    assert [path.name for path in run.directories] == ["version_0", "version_1"]
    reward = run.scalars.series["rollout/reward"]
    assert reward.steps.tolist() == list(range(61))
    assert reward.values.tolist() == [0.25] * 20 + [0.75] * 41
    assert run.scalars.resumed == [20]
    html = page(run)
    assert "class='resumed'" in html
    strip = re.findall(r'title="step (\d+)"', html)
    assert strip == ["0", "10", "20", "30", "40", "50", "60"]

    shutil.rmtree(tmp_path / "runs/version_0")
    shutil.copy(later / "config.yaml", tmp_path)  # that of a user who starts trainings here
    assert "is in no run directory that is here" in text_of(page(read_run(later)))


def test_two_event_files_in_one_directory(tmp_path: Path) -> None:
    """As with `version: run_a` and a resume into the same directory."""
    for part, (first, last, value) in enumerate(((0, 30, 0.25), (20, 40, 0.75))):
        logger = TensorBoardLogger(tmp_path, "", "run_a", default_hp_metric=False)
        log(logger, first, last, value)
        (path,) = (tmp_path / "run_a").glob("events.out.tfevents.[12]*")
        path.rename(path.with_name(f"events.out.tfevents.00{part}.host"))  # both began in the same second
    found = read_scalars([tmp_path / "run_a"])
    assert found.series["rollout/reward"].values.tolist() == [0.25] * 20 + [0.75] * 20


def test_the_table_of_csvlogger_holds_the_same(tmp_path: Path) -> None:
    directories = []
    for logger in (CSVLogger(tmp_path, "table"), TensorBoardLogger(tmp_path, "board", default_hp_metric=False)):
        log(logger, 0, 25, 0.5)
        directories.append(Path(str(logger.log_dir)))
    table, board = (read_scalars([directory]).series for directory in directories)
    assert table.keys() == board.keys() - {"epoch"}
    for name, series in table.items():
        np.testing.assert_array_equal(series.steps, board[name].steps)
        np.testing.assert_allclose(series.values, board[name].values, rtol=1e-6)


def test_no_run(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with pytest.raises(ValueError, match=r"is no run itself, but holds some: .*version_0\. Give one of them"):
        read_run(run.parent)
    with pytest.raises(ValueError, match="version_0"):
        read_run(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no run: none of config\.yaml"):
        read_run(tmp_path / "empty")
    with pytest.raises(ValueError, match="is no directory"):
        read_run(tmp_path / "nowhere")


finite = st.floats(-1e6, 1e6, allow_nan=False)


@given(st.lists(finite, min_size=1, max_size=2000), st.integers(1, 400))
def test_thinned_curves_hide_no_extreme(values: list[float], most: int) -> None:
    series = Series(np.arange(len(values)) * 3, np.array(values))
    curve = thin(series, most)
    assert len(curve.steps) <= most
    assert np.all(np.diff(curve.steps) > 0)
    assert (curve.low.min(), curve.high.max()) == (min(values), max(values))
    counts = np.diff([*range(0, len(values), curve.every), len(values)])
    assert np.average(curve.values, weights=counts) == pytest.approx(np.mean(values), abs=1e-6 * max(map(abs, values)))


def test_long_runs_stay_small_and_say_that_they_are_thinned() -> None:
    values = np.full(50_000, 1.0)
    values[31_234] = 99.0
    chart = line_chart("KL", {"k3": Series(np.arange(50_000), values)})
    assert len(chart.svg) < 45 * MOST_POINTS
    assert "between 1 and 99" in chart.svg
    assert chart.notes == ["The line is the mean of 167 neighbouring points, the shade their range."]
    band = re.search(r"class='range c0' d='M(.*?)Z'", str(chart.svg))
    assert band is not None
    assert min(float(y) for y in re.findall(r" ([\d.]+)(?:L|$)", band[1])) < 20  # the spike is drawn


def test_one_point_is_a_dot_at_its_step() -> None:
    chart = line_chart("KL", {"k3": Series(np.array([7]), np.array([0.5]))})
    assert "<circle class='dot c0'" in chart.svg
    assert re.findall(r"text-anchor='middle'>([^<]+)<", str(chart.svg)) == ["7"]


def test_figures_that_are_no_numbers_are_counted(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    for step, value in enumerate((1.0, float("nan"), float("inf"), 2.0)):
        logger.log_metrics({"train/loss": value, "own/other": float("nan")}, step)
    logger.save()
    found = read_scalars([Path(logger.log_dir)])
    assert (found.series["train/loss"].values.tolist(), found.series["train/loss"].not_finite) == ([1.0, 2.0], 2)
    text = text_of(page(read_run(Path(logger.log_dir))))
    assert "loss was no number at 2 steps." in text
    assert "own/other never was a number." in text


@given(
    st.lists(st.sampled_from(["<observe>", "</observe>", "<think>", "</think>", "<answer>", "</answer>", "a", " <b> "]))
)
def test_marked_parts_are_the_text(pieces: list[str]) -> None:
    text = "".join(pieces)
    assert "".join(piece for _, piece in tagged_parts(text)) == text


def test_parts_and_long_completions() -> None:
    assert tagged_parts("<think>x<observe>y</observe>z</think><answer>4") == [
        ("tag", "<think>"), ("think", "x"), ("tag", "<observe>"), ("observe", "y"), ("tag", "</observe>"),
        ("think", "z"), ("tag", "</think>"), ("tag", "<answer>"), ("answer", "4"),
    ]  # fmt: skip
    assert tagged_parts("a" * 5000, most=3000)[1] == ("cut", "2,000 more characters")


def test_pictures_are_bounded(tmp_path: Path) -> None:
    pictures = Pictures(most_bytes=30_000)
    for number in range(5):
        Image.effect_noise((900, 700), 80).save(tmp_path / f"{number}.png")
    given = [pictures.address(tmp_path / f"{number}.png") for number in range(5)]
    assert sum(address is not None for address in given) == 5 - pictures.left_out > 0
    assert sum(len(address or "") for address in given) < 41_000
    assert pictures.address(tmp_path / "none.png") is None
    assert pictures.broken == 1


def test_secrets_are_left_out() -> None:
    text = "a: 1\n  api_key: abc\nmax_new_tokens: 5\nuri: http://me:pass@host/x\n- password: 'x y'\nhf_token: null\n"
    shown = masked_text(text)
    assert shown == "a: 1\n  api_key: …\nmax_new_tokens: 5\nuri: http://…@host/x\n- password: …\nhf_token: null\n"
    config = {
        "data": {
            "ladder": "https://bob:hunter2@host/l?sig=abc",
            "remote": {"storage_options": {"user": ["abc"], "n": 3}},
        },
        "access_token": "abc",
        "max_new_tokens": 5,
        "server_key": None,
    }
    assert masked(config) == {
        "data": {"ladder": "https://…@host/l?…", "remote": {"storage_options": {"user": ["…"], "n": 3}}},
        "access_token": "…",
        "max_new_tokens": 5,
        "server_key": None,
    }


def test_configs_far_from_any_shipped_one_are_not_compared() -> None:
    assert compare({"trainer": {"max_epochs": 3}}) is None
