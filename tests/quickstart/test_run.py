"""The quick start (README.md) through the real command line, shortened: every part of it, with fewer questions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SHORTENED = (
    *("fit", "--config=quickstart.yaml", "--trainer.max_epochs=1"),
    *("--data.train_questions=64", "--data.held_out_questions=24", "--trainer.val_check_interval=1.0"),
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, command_line: Callable[[Path], Any]) -> Path:
    directory = tmp_path_factory.mktemp("quickstart")
    command_line(directory)(*SHORTENED)
    return directory


@pytest.fixture(scope="module")
def run(directory: Path) -> Path:
    (run,) = (directory / "runs" / "quickstart").iterdir()
    return run


@pytest.mark.slow
def test_summary(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["seed"], summary["optimizer_steps"]) == ("finished", 0, 4)
    assert [validation["step"] for validation in summary["validations"]] == [0, 4]
    assert summary["pass_rate"]["before"] == summary["validations"][0]["pass_rate"]
    assert summary["pass_rate"]["after"] == summary["validations"][1]["pass_rate"]
    assert 0.2 < summary["pass_rate"]["before"] < 0.8
    phases = {"total", "data", "generate", "reward", "old_logprobs", "reference_logprobs", "train", "validate"}
    assert phases <= summary["seconds"].keys()
    assert all(seconds > 0 for seconds in summary["seconds"].values())


@pytest.mark.slow
def test_tensorboard_shows_what_a_run_did(run: Path) -> None:
    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "histograms": 0, "images": 0}).Reload()
    scalars = set(events.Tags()["scalars"])
    assert {f"rollout/{n}" for n in ("reward", "pass_rate", "length", "truncated", "wasted_groups")} <= scalars
    assert {f"reward/{n}" for n in ("format", "accuracy", "bonus")} <= scalars
    assert {f"train/{n}" for n in ("loss", "kl", "entropy", "clip_fraction", "sampler_mismatch")} <= scalars
    assert {f"seconds/{n}" for n in ("generate", "reward", "old_logprobs", "reference_logprobs", "train")} <= scalars
    assert {"speed/generated_tokens_per_second", "speed/trained_tokens_per_second", "val/pass_rate"} <= scalars
    assert sum(name.startswith("pass_rate_by_level/") for name in scalars) >= 4
    assert sum(name.startswith("val/pass_rate_by_level/") for name in scalars) >= 4
    assert "lr-AdamW" in scalars
    assert {"histogram/dynamic_weight", "histogram/reward", "histogram/length"} <= set(events.Tags()["histograms"])
    assert events.Tags()["images"] == ["completions"]
    for name in ("rollout/pass_rate", "reward/format", "rollout/wasted_groups", "train/clip_fraction"):
        assert all(0 <= event.value <= 1 for event in events.Scalars(name))
    assert all(
        abs(event.value) < 1e-4 for event in events.Scalars("train/sampler_mismatch")
    )  # the sampler is the trainer
    assert events.Scalars("train/kl")[0].value == pytest.approx(0, abs=1e-6)  # the policy starts as the reference


@pytest.mark.slow
def test_completions_table(run: Path) -> None:
    with Image.open(run / "completions" / "step-000000.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[0] > 500
    assert pixels.shape[1] > 1000
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50  # pictures and text, not an empty page
    rows = [json.loads(line) for line in (run / "completions" / "completions.jsonl").read_text().splitlines()]
    assert len(rows) == 32 * 8
    for row in rows:
        parts = row["reward/accuracy"] + 0.5 * row["reward/format"] + row["reward/bonus"]
        assert row["reward"] == pytest.approx(parts, abs=1e-5)
        assert row["correct"] == (row["reward/accuracy"] == 1)


@pytest.mark.slow
def test_exported_policy_answers_with_plain_transformers(run: Path) -> None:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from observe_r1.ladder.reader import LadderDataset

    model = AutoModelForImageTextToText.from_pretrained(run / "hf").eval()
    trained = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert not any(name.startswith("reference.") for name in trained)
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained[f"policy.model.{name}"]), name
    processor = AutoProcessor.from_pretrained(run / "hf")
    prompt = LadderDataset(run.parent.parent.parent / "data/quickstart/held_out")[0]
    text = processor.apply_chat_template(list(prompt.messages), add_generation_prompt=True)
    inputs = processor(text=[text], images=list(prompt.images), return_tensors="pt")
    answer = processor.decode(model.generate(**inputs, max_new_tokens=32, do_sample=False)[0])
    assert "<answer>" in answer


@pytest.mark.slow
def test_the_ladder_is_made_once_and_never_mistaken(directory: Path, command_line: Callable[[Path], Any]) -> None:
    ladder = directory / "data/quickstart/ladder.json"
    before = ladder.stat().st_mtime_ns
    command_line(directory)("validate", *SHORTENED[1:])
    assert ladder.stat().st_mtime_ns == before
    output = command_line(directory)("validate", *SHORTENED[1:], "--data.train_questions=65", expect=1)
    assert "64 + 24" in output
    assert "65 + 24" in output


@pytest.mark.slow
def test_report(directory: Path, run: Path, command_line: Callable[[Path], Any], browser: Callable[..., Any]) -> None:
    """The command of docs/loggers.md on what a training left, opened in a browser."""
    output = command_line(directory)("report", run.relative_to(directory))
    assert "Report: runs/quickstart/version_0/report.html" in output
    found = browser(run / "report.html", "light", 400)
    (seen,) = found["seen"]
    assert (found["console"], found["requests"]) == ([], [(run / "report.html").as_uri()])
    assert seen["scroll"] <= 400
    expected = {
        "learning",
        "levels",
        "held_out",
        "completions",
        "policy",
        "waste",
        "time",
        "samples",
        "config",
        "versions",
    }
    assert expected <= {name for name, _ in seen["sections"]}
    assert len(seen["pictures"]) > 8
    assert all(size == 112 and alt for size, alt, _ in seen["pictures"])
    assert "finished" in seen["text"]
    for changed in (
        "trainer.val_check_interval",
        "data.init_args.train_questions",
        "data.init_args.held_out_questions",
    ):
        assert changed in seen["text"]
    assert "What is missing" not in seen["text"]
