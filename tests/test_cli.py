"""The command line as a user meets it: own files, wrong keys, wrong paths, bad shards."""

from __future__ import annotations

import csv
import json
import re
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

README = (Path(__file__).parent.parent / "README.md").read_text()


def readme_block(first_line: str) -> str:
    """The code block of the README that begins with this line."""
    (block,) = (b for b in re.findall(r"```\w+\n(.*?)```", README, flags=re.DOTALL) if b.startswith(first_line))
    return str(block)


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
    (tmp_path / "mine.py").write_text(readme_block("# mine.py"))
    (tmp_path / "mine.yaml").write_text(readme_block("# mine.yaml"))
    output = run(
        "fit",
        *SHORT,
        "--config=mine.yaml",
        "--trainer.callbacks+=mine.Note",
        f"--data.ladder={tiny_ladder}",
        f"--data.held_out={held_out_ladder}",
    )
    assert output.count("8 groups, pass rate 0.") == 3
    directory = run_directory(tmp_path)
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert set(summary["pass_rate"]) == {"before", "after"}
    assert 0 <= summary["pass_rate"]["after"] <= 1
    assert summary["optimizer_steps"] == 6
    assert {"generate", "reward", "train", "validate"} <= summary["seconds"].keys()
    assert summary["skipped"] == {"train": {}, "held_out": {}}
    assert sum(summary["verdicts"]["train"].values()) == 24 * 4
    assert sum(summary["verdicts"]["held_out"].values()) == 12 * len(summary["validations"])
    assert summary["versions"]["torch"]
    rows = [json.loads(line) for line in (directory / "completions" / "completions.jsonl").read_text().splitlines()]
    assert len(rows) == 8 * 4
    for row in rows:
        weighted = 0.5 * row["reward/format"] + row["reward/accuracy"] + 0.3 * row["reward/brevity"]
        expected = weighted + row["reward/bonus"]
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
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_half_precision_trains_with_shared_prefixes(
    run: Any, tmp_path: Path, tiny_ladder: Path, precision: str
) -> None:
    """No fallback to the padded forward, and the policy that sampled is the one that trains."""
    output = run(
        "fit",
        *SHORT,
        f"--trainer.precision={precision}",
        "--trainer.num_sanity_val_steps=0",
        "--trainer.limit_val_batches=0",
        "--trainer.max_steps=2",
        "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
        "--trainer.logger.save_dir=csv",
        f"--data.ladder={tiny_ladder}",
    )
    assert "does not fit" not in output
    (table,) = tmp_path.glob("csv/**/metrics.csv")
    rows = list(csv.DictReader(table.open()))
    first = next(row for row in rows if row.get("train/sampler_mismatch"))
    assert 0 < float(first["train/sampler_mismatch"]) < 0.05
    assert float(first["train/log_ratio"]) == 0.0  # old and new log-probs to the last bit


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
    assert 1 <= summary["skipped"]["train"]["shard_truncated"] <= 7
    assert summary["pass_rate"] == {"before": None, "after": None}


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


@pytest.mark.slow
def test_what_is_no_checkpoint_is_refused(run: Any, tmp_path: Path, tiny_ladder: Path) -> None:
    import pickle

    import torch

    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "executed",)

    (tmp_path / "text.ckpt").write_text("no checkpoint")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    (tmp_path / "malicious.ckpt").write_bytes(pickle.dumps({"observe_r1": Malicious()}))
    for name, expected in (
        ("text", "not a checkpoint"),
        ("other", "not written by"),
        ("malicious", "not a checkpoint"),
    ):
        output = run("fit", *SHORT, f"--data.ladder={tiny_ladder}", f"--ckpt_path={name}.ckpt", expect=1)
        assert expected in output
    assert not (tmp_path / "executed").exists()


@pytest.mark.slow
def test_a_reward_that_fails_is_named(run: Any, tmp_path: Path, tiny_ladder: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from observe_r1.rewards import Reward\n"
        "class Broken(Reward):\n    def score(self, prompt, completion):\n        raise KeyError('x')\n"
        "class Undefined(Reward):\n    def score_groups(self, groups):\n"
        "        return [[float('nan')] * len(group.completions) for group in groups]\n"
        "    def score(self, prompt, completion): ...\n"
    )
    quick = ("--trainer.num_sanity_val_steps=0", "--trainer.limit_val_batches=0", f"--data.ladder={tiny_ladder}")
    for name, expected in (
        ("Broken", "raised by reward 'odd' (Broken)"),
        ("Undefined", "reward 'odd' gave a score of nan"),
    ):
        output = run("fit", *SHORT, *quick, f"--model.rewards.odd=mine.{name}", expect=1)
        assert expected in output
    statuses = [json.loads(path.read_text())["status"] for path in sorted(tmp_path.glob("runs/**/summary.json"))]
    assert statuses[0] == "KeyError: 'x' (raised by reward 'odd' (Broken))"


@pytest.mark.slow
def test_held_out_questions_that_nobody_can_judge_are_not_wrong(run: Any, tmp_path: Path, tiny_ladder: Path) -> None:
    """One gold is beyond the limits of the verification, one picture is damaged: both are counted, neither is wrong."""
    import dataclasses

    from observe_r1.answers import Gold
    from observe_r1.ladder.shards import write_ladder
    from observe_r1.quickstart.questions import make_question

    prompts = [make_question("held_out", 5, index).prompt() for index in range(3)]
    prompts[1] = dataclasses.replace(prompts[1], gold=Gold("9^{9^{9^9}}", "math"))
    write_ladder(prompts, tmp_path / "questions")
    (shard,) = (tmp_path / "questions").glob("*.tar")
    content = bytearray(shard.read_bytes())
    picture = content.rindex(b"IHDR")
    content[picture : picture + 12] = bytes(12)
    shard.write_bytes(content)
    output = run("validate", *SHORT, f"--data.ladder={tiny_ladder}", f"--data.held_out={tmp_path / 'questions'}")
    assert "shard_changed" in output
    assert re.search(r"val/pass_rate.*[01]\.0", output)


@pytest.mark.slow
def test_two_ranks(run: Any, tmp_path: Path, tiny_ladder: Path, held_out_ladder: Path) -> None:
    """Two processes share the rollouts and the held-out questions, and nothing waits forever."""
    data = (f"--data.ladder={tiny_ladder}", f"--data.held_out={held_out_ladder}")
    ranks = ("--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp")
    run("fit", *SHORT, *data, *ranks, "--trainer.accumulate_grad_batches=2", "--model.updates.steps_per_rollout=2")
    summary = json.loads((run_directory(tmp_path) / "summary.json").read_text())
    assert (summary["status"], summary["optimizer_steps"]) == ("finished", 6)
    for validation in summary["validations"]:
        assert validation["pass_rate"] * 12 == pytest.approx(round(validation["pass_rate"] * 12), abs=1e-4)


def test_help_names_every_command(run: Any) -> None:
    output = run("--help")
    for command in ("fit", "validate", "test", "predict", "ladder", "score"):
        assert command in output
