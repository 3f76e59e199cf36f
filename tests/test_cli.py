"""The command line as a user meets it: own files, wrong keys, wrong paths, bad shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SHORT = (
    "--config=quickstart.yaml",
    "--trainer.enable_model_summary=false",
    "--trainer.enable_progress_bar=false",
    "--model.sampling.group_size=4",
    "--model.sampling.max_new_tokens=20",
    "--data.class_path=observe_r1.datamodules.NeuraLadderDataModule",
    "--data.prompts_per_rollout=8",
)

OWN = '''
import lightning as L
from observe_r1.rewards import Reward

class Brevity(Reward):
    """One point, less a hundredth for every token."""

    def score(self, prompt, completion):
        return 1.0 - 0.01 * len(completion)

class Note(L.Callback):
    def on_rollout_end(self, trainer, module, experience):
        print("own callback saw", len(experience.groups), "groups with", sorted(experience.groups[0].scores.parts))
'''

Run = Callable[[Path], Any]


@pytest.fixture
def run(tmp_path: Path, command_line: Run) -> Any:
    return command_line(tmp_path)


def run_directory(tmp_path: Path) -> Path:
    (directory,) = (tmp_path / "runs" / "quickstart").iterdir()
    return directory


@pytest.mark.slow
def test_own_reward_and_callback_from_a_file(
    run: Any, tmp_path: Path, tiny_ladder: Path, held_out_ladder: Path
) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "mine.yaml").write_text(
        "model:\n  rewards:\n"
        "    accuracy: observe_r1.rewards.AccuracyReward\n"
        "    short: {class_path: mine.Brevity, init_args: {weight: 0.3}}\n"
    )
    output = run(
        "fit",
        *SHORT,
        "--config=mine.yaml",
        "--trainer.callbacks+=mine.Note",
        f"--data.ladder={tiny_ladder}",
        f"--data.held_out={held_out_ladder}",
    )
    assert output.count("own callback saw 8 groups with ['accuracy', 'bonus', 'short']") == 3
    directory = run_directory(tmp_path)
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert set(summary["pass_rate"]) == {"before", "after"}
    assert 0 <= summary["pass_rate"]["after"] <= 1
    assert summary["optimizer_steps"] == 3
    assert {"generate", "reward", "train", "validate"} <= summary["seconds"].keys()
    assert summary["skipped"] == {}
    assert summary["versions"]["torch"]
    rows = [json.loads(line) for line in (directory / "completions" / "completions.jsonl").read_text().splitlines()]
    assert len(rows) == 8 * 4
    for row in rows:
        expected = row["reward/accuracy"] + 0.3 * row["reward/short"] + row["reward/bonus"]
        assert row["reward"] == pytest.approx(expected, abs=1e-5)
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(directory / "hf")
    assert model.config.model_type == "qwen2_5_vl"
    assert AutoProcessor.from_pretrained(directory / "hf").tokenizer.vocab_size > 200


@pytest.mark.slow
def test_validate_test_and_predict(run: Any, tmp_path: Path, tiny_ladder: Path, held_out_ladder: Path) -> None:
    data = (f"--data.ladder={tiny_ladder}", f"--data.held_out={held_out_ladder}")
    assert "val/pass_rate" in run("validate", *SHORT, *data)
    assert "test/pass_rate" in run("test", *SHORT, *data)
    run("predict", *SHORT, *data, "--trainer.callbacks+=observe_r1.callbacks.CompletionWriter")
    rows = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert [row["position"] for row in rows] == list(range(12))
    assert all(isinstance(row["correct"], bool) and "<answer>" in row["completion"] for row in rows)


@pytest.mark.slow
def test_bad_samples_are_skipped_by_name_and_counted(run: Any, tmp_path: Path, tiny_ladder: Path) -> None:
    """A shard is cut in the middle: what is left of it is trained on, the rest is counted."""
    ladder = tmp_path / "ladder"
    shutil.copytree(tiny_ladder, ladder)
    shard = sorted(ladder.glob("*.tar"))[1]
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    run("fit", *SHORT, "--trainer.num_sanity_val_steps=0", "--trainer.limit_val_batches=0", f"--data.ladder={ladder}")
    summary = json.loads((run_directory(tmp_path) / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert 1 <= summary["skipped"]["shard_truncated"] <= 7
    assert summary["pass_rate"] == {"before": None, "after": None}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["fit", *SHORT, "--model.sampling.temprature=1"], "temprature"),
        (["fit", *SHORT, "--model.objective.name=ppo"], "dr_grpo"),
        (["fit", *SHORT, "--data.ladder=.", "--model.sampling.group_size=0"], "group_size is 0"),
        (["fit", *SHORT, "--data.ladder=missing"], "missing"),
        (["fit", *SHORT, "--data.ladder=.", "--model.policy.pretrained=./nowhere"], "./nowhere"),
        (["fit", "--config=nowhere.yaml"], "nowhere.yaml"),
        (["ladder", "import", "nothing.jsonl", "out"], "nothing.jsonl"),
        (["ladder", "import"], "input"),
    ],
)
def test_mistakes_are_named(run: Any, arguments: list[str], expected: str) -> None:
    output = run(*arguments, expect=None)
    assert expected in output
    assert "finished" not in output


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused(run: Any, tmp_path: Path, tiny_ladder: Path) -> None:
    import torch

    data = f"--data.ladder={tiny_ladder}"
    quick = ("--trainer.max_steps=1", "--trainer.num_sanity_val_steps=0", "--trainer.limit_val_batches=0")
    run("fit", *SHORT, *quick, data)
    (path,) = tmp_path.glob("runs/quickstart/*/checkpoints/last.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["observe_r1"]["fingerprint"]["layers"] += 1
    torch.save(checkpoint, tmp_path / "other.ckpt")
    output = run("fit", *SHORT, *quick, data, "--ckpt_path=other.ckpt", expect=1)
    assert "belongs to another model" in output
    assert "layers" in output


def test_help_names_every_command(run: Any) -> None:
    output = run("--help")
    for command in ("fit", "validate", "test", "predict", "ladder"):
        assert command in output
