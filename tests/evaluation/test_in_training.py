"""Benchmarks inside of real runs of the command line, on the tiny policy."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI

from observe_r1.callbacks import BenchmarkEvaluation, RewardLogger
from observe_r1.cli import locate_config
from observe_r1.datamodules import NeuraLadderDataModule
from observe_r1.evaluation import MMMU, MathVista
from observe_r1.evaluation.predictions import Prediction, read_predictions
from observe_r1.module import ObserveR1

DOCS = (Path(__file__).parent.parent.parent / "docs" / "evaluation.md").read_text()
OVERLAY = Path(__file__).parent.parent.parent / "configs" / "evaluation" / "mathvista_mmmu.yaml"

SHORT = (
    "--config=quickstart.yaml",
    "--trainer.enable_model_summary=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.num_sanity_val_steps=0",
    "--model.sampling.group_size=4",
    "--model.sampling.max_new_tokens=20",
    "--model.prompt.max_prompt_tokens=512",
    "--data.class_path=observe_r1.datamodules.NeuraLadderDataModule",
    "--data.prompts_per_rollout=8",
)


@pytest.fixture
def run(tmp_path: Path, command_line: Callable[[Path], Any]) -> Any:
    return command_line(tmp_path)


@pytest.fixture
def overlay(tmp_path: Path, mathvista_directory: Path, merged_mmmu: Path) -> str:
    """The shipped overlay with the small data sets, evaluating every third step."""
    document = yaml.safe_load(OVERLAY.read_text())
    evaluation, checkpoint = document["trainer"]["callbacks+"]
    mathvista, mmmu = evaluation["init_args"]["benchmarks"]
    mathvista["init_args"]["source"], mmmu["init_args"]["source"] = str(mathvista_directory), str(merged_mmmu)
    evaluation["init_args"] |= {"every_n_steps": 3, "max_new_tokens": 24, "questions_per_batch": 5}
    checkpoint["init_args"] |= {"every_n_train_steps": 3}
    (tmp_path / "evaluation.yaml").write_text(yaml.safe_dump(document))
    return "--config=evaluation.yaml"


def version(tmp_path: Path, number: int = 0) -> Path:
    return tmp_path / "runs" / "quickstart" / f"version_{number}"


def predictions(directory: Path, name: str, file: str) -> list[Prediction]:
    return read_predictions(directory / "evaluation" / name / f"{file}.jsonl")[1]


def figures(directory: Path, name: str, file: str) -> Any:
    return json.loads((directory / "evaluation" / name / f"{file}.json").read_text())


@pytest.mark.slow
def test_training_with_benchmarks(run: Any, tmp_path: Path, tiny_ladder: Path, overlay: str) -> None:
    """The same weights with and without, evaluated between rollouts and within one; the same figures offline.

    A rollout is trained on for two steps of two micro-batches; there are evaluations at 0, 3 and 6 steps.
    """
    data = (f"--data.ladder={tiny_ladder}", "--trainer.accumulate_grad_batches=2")
    run("fit", *SHORT, *data)
    (tmp_path / "own.py").write_text(OWN)
    config = tmp_path / "evaluation.yaml"
    config.write_text(config.read_text().replace("observe_r1.evaluation.MathVista", "own.Drawing"))
    run(
        "fit",
        *SHORT,
        *data,
        overlay,
        "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
        "--trainer.logger.save_dir=csv",
    )
    (with_it,) = tmp_path.glob("csv/*/version_*")
    plain, evaluated = (
        torch.load(directory / "checkpoints" / "last.ckpt", weights_only=True)
        for directory in (version(tmp_path), with_it)
    )
    assert plain["global_step"] == evaluated["global_step"] == 6
    for name, weight in plain["state_dict"].items():
        assert torch.equal(weight, evaluated["state_dict"][name]), name
    for one, other in zip(
        plain["optimizer_states"][0]["state"].values(), evaluated["optimizer_states"][0]["state"].values(), strict=True
    ):
        assert all(torch.equal(one[name], other[name]) for name in one)
    (one,), (other,) = plain["observe_r1"]["rng"], evaluated["observe_r1"]["rng"]  # of the only rank
    assert torch.equal(one, other)

    for name, questions in (("mathvista", 23), ("mmmu", 21)):
        written = sorted(path.name for path in (with_it / "evaluation" / name).iterdir())
        assert written == sorted(f"step-00000{step}.{kind}" for step in (0, 3, 6) for kind in ("jsonl", "json", "png"))
        assert [p.position for p in predictions(with_it, name, "step-000003")] == list(range(questions))
    assert predictions(with_it, "mathvista", "step-000000") != predictions(with_it, "mathvista", "step-000006")
    rows = list(csv.DictReader((with_it / "metrics.csv").open()))
    logged = {int(row["step"]): float(row["mathvista/accuracy"]) for row in rows if row.get("mathvista/accuracy")}
    overall = {
        step: figures(with_it, "mathvista", f"step-00000{step}")["scores"]["strict"]["overall"] for step in (0, 3, 6)
    }
    assert logged == {step: pytest.approx(values["accuracy"]) for step, values in overall.items()}
    assert overall[0]["correct"] > 5  # the tiny policy can see
    (best,) = with_it.glob("checkpoints/best-*.ckpt")
    best_step = int(re.findall(r"step=(\d+)", best.name)[0])
    assert logged[best_step] == max(logged[step] for step in (3, 6))

    offline = (*SHORT, *data, overlay)
    run("validate", *offline, f"--ckpt_path={with_it / 'checkpoints' / 'last.ckpt'}")
    run("validate", *offline, f"--model.policy.pretrained={with_it / 'hf'}")
    for number, name in ((1, "mathvista"), (1, "mmmu"), (2, "mathvista"), (2, "mmmu")):
        assert predictions(version(tmp_path, number), name, "validate") == predictions(with_it, name, "step-000006")
        assert figures(version(tmp_path, number), name, "validate") == figures(with_it, name, "step-000006")
    output = run("score", with_it / "evaluation" / "mmmu" / "step-000006.jsonl", "--report_to=again.json")
    assert "Art and Design" in output
    assert json.loads((tmp_path / "again.json").read_text()) == figures(with_it, "mmmu", "step-000006")


@pytest.mark.slow
def test_two_ranks_give_the_figures_of_one(run: Any, tmp_path: Path, tiny_ladder: Path, overlay: str) -> None:
    """23 and 21 questions in blocks of 5: neither questions nor blocks can be shared evenly."""
    ranks = ("--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp")
    for arguments in ((), ranks):
        run("validate", *SHORT, f"--data.ladder={tiny_ladder}", overlay, *arguments)
    one, two = version(tmp_path, 0), version(tmp_path, 1)
    for name in ("mathvista", "mmmu"):
        assert predictions(one, name, "validate") == predictions(two, name, "validate")
        assert figures(one, name, "validate") == figures(two, name, "validate")
        assert not list((two / "evaluation" / name).glob("*.partial"))


@pytest.mark.slow
def test_training_on_two_ranks_logs_what_one_would(run: Any, tmp_path: Path, tiny_ladder: Path, overlay: str) -> None:
    """The metric's own figures, as loggers get them, against a recount of the saved predictions."""
    ranks = ("--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_steps=3")
    logger = ("--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir=csv")
    run("fit", *SHORT, f"--data.ladder={tiny_ladder}", overlay, *ranks, *logger)
    (directory,) = tmp_path.glob("csv/*/version_*")
    rows = list(csv.DictReader((directory / "metrics.csv").open()))
    for step in (0, 3):
        (row,) = (row for row in rows if row["step"] == str(step) and row.get("mmmu/accuracy"))
        saved = predictions(directory, "mmmu", f"step-00000{step}")
        right = sum(p.verdict.strict.is_right for p in saved)
        assert len(saved) == float(row["mmmu/questions"]) == 21
        assert float(row["mmmu/accuracy"]) == pytest.approx(right / 21)
        assert float(row["mmmu/length"]) == pytest.approx(sum(p.tokens for p in saved) / 21)
        report = figures(directory, "mmmu", f"step-00000{step}")
        assert float(row["mmmu/accuracy_official"]) == pytest.approx(
            report["scores"]["official"]["overall"]["accuracy"]
        )


OWN = """
import os, random, signal
from dataclasses import replace
import numpy, torch
from pathlib import Path
from observe_r1.evaluation import MathVista

class Killing(MathVista):
    '''Ends the process without warning at one of the questions, once, and notes what is asked.'''
    def text(self, row):
        return "Look! " * Path("reworded").exists() + super().text(row)

    def judge(self, item, response):
        return super().judge(replace(item, answer="nothing") if Path("harsh").exists() else item, response)

    def prompt(self, position):
        with open("asked", "a") as file:
            file.write(f"{position} ")
        if position == 12 and not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().prompt(position)

class Drawing(MathVista):
    '''Draws from every global random state.'''
    def prompt(self, position):
        torch.rand(3), numpy.random.rand(), random.random()
        return super().prompt(position)

class Failing(MathVista):
    '''On the last rank only.'''
    name = "failing"
    def judge(self, item, response):
        if int(os.environ.get("LOCAL_RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1:
            raise ZeroDivisionError("of its own")
        return super().judge(item, response)
"""


def own(kind: str, source: Path, **options: Any) -> str:
    """An overlay with one benchmark of the user."""
    benchmark = {"class_path": f"own.{kind}", "init_args": {"source": str(source)}}
    arguments = {
        "benchmarks": [benchmark],
        "max_new_tokens": 24,
        "questions_per_batch": 5,
        "example_rows": 0,
        **options,
    }
    callback = {"class_path": "observe_r1.callbacks.BenchmarkEvaluation", "init_args": arguments}
    return yaml.safe_dump({"trainer": {"callbacks+": [callback]}})


@pytest.mark.slow
def test_an_interrupted_evaluation_goes_on(
    run: Any, tmp_path: Path, tiny_ladder: Path, mathvista_directory: Path
) -> None:
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "own.yaml").write_text(own("Killing", mathvista_directory, directory="kept"))
    arguments = ("validate", *SHORT, f"--data.ladder={tiny_ladder}", "--config=own.yaml")
    asked = tmp_path / "asked"
    run(*arguments, expect=-9)
    assert asked.read_text().split() == [str(n) for n in range(13)]
    saved = tmp_path / "kept/mathvista/validate.jsonl"

    def asked_now(*options: str) -> list[int]:
        asked.unlink()
        run(*arguments, *options)
        return [int(position) for position in asked.read_text().split()]

    # one prompt to compare with the saved one, the block of question 12, and what follows
    assert asked_now() == [0, *range(10, 23)]
    resumed = saved.read_text()
    (tmp_path / "harsh").touch()
    assert asked_now() == [0]  # complete, and judged as the benchmark judges now
    header, again = read_predictions(saved)
    assert not any(p.verdict.strict.is_right for p in again)
    (tmp_path / "harsh").unlink()
    saved.unlink()
    assert asked_now() == [*range(23)]
    assert saved.read_text() == resumed
    (tmp_path / "reworded").touch()
    assert asked_now() == [0, *range(23)]  # other prompts: from the beginning
    assert asked_now("--trainer.callbacks.questions_per_batch=4") == [*range(23)]  # other settings, too
    assert {**read_predictions(saved)[0].asked, "questions_per_batch": 5} == header.asked


SHARDED = (
    *("--trainer.strategy=fsdp2", "--model.rollout=observe_r1.rollout.HFRollout"),
    "--model.rollout.keep_weights_whole=false",
)
BEST = """
trainer:
  callbacks+:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {monitor: failing/accuracy, mode: max, every_n_train_steps: 2, filename: best}
"""


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_a_failing_evaluation_ends_the_training_only_if_asked(
    run: Any, tmp_path: Path, tiny_ladder: Path, held_out_ladder: Path, mathvista_directory: Path, devices: int
) -> None:
    """The other rank needs this one's weights for every token, and a checkpoint waits for the figure."""
    (tmp_path / "own.py").write_text(OWN)
    once = {"max_new_tokens": 4, "max_samples": 12, "at_end": False}
    (tmp_path / "own.yaml").write_text(own("Failing", mathvista_directory, **once))
    (tmp_path / "strict.yaml").write_text(own("Failing", mathvista_directory, **once, on_error="raise"))
    (tmp_path / "best.yaml").write_text(BEST)
    ranks = ("--trainer.accelerator=cpu", f"--trainer.devices={devices}", *(SHARDED if devices > 1 else ()))
    arguments = ("fit", *SHORT, *ranks, f"--data.ladder={tiny_ladder}", "--trainer.max_steps=2", "--config=best.yaml")
    arguments += (f"--data.held_out={held_out_ladder}", "--trainer.val_check_interval=2")
    output = run(*arguments, "--config=own.yaml")
    assert "The evaluation of failing failed: ZeroDivisionError: of its own" in output
    assert json.loads((version(tmp_path) / "summary.json").read_text())["status"] == "finished"
    # of two, Lightning's launcher may end the first rank as soon as the other has ended
    output = run(*arguments, "--config=strict.yaml", expect=1 if devices == 1 else None)
    assert "The evaluation of failing failed: " in output
    assert "\nfinished" not in output


@pytest.mark.slow
def test_questions_that_cannot_be_asked_are_wrong_and_counted(
    run: Any, tmp_path: Path, tiny_ladder: Path, mathvista_directory: Path
) -> None:
    (tmp_path / "own.py").write_text(OWN.replace("position == 12", "False"))
    (tmp_path / "own.yaml").write_text(own("Killing", mathvista_directory))
    prompt = ("--model.prompt.max_prompt_tokens=32",)
    output = run("validate", *SHORT, f"--data.ladder={tiny_ladder}", "--config=own.yaml", *prompt)
    result = figures(version(tmp_path), "mathvista", "validate")
    assert 0 < result["refused"] < 23
    assert result["questions"] == 23
    assert f"{result['refused']} questions could not be asked and count as wrong" in " ".join(output.split())
    refused = [p for p in predictions(version(tmp_path), "mathvista", "validate") if p.refused]
    assert len(refused) == result["refused"]
    assert all(p.refused is not None and p.refused.startswith("prompt_too_long") for p in refused)


@pytest.mark.slow
def test_the_benchmark_of_the_documentation(run: Any, tmp_path: Path, tiny_ladder: Path) -> None:
    """Its code as it stands there, on data in MathVerse's form."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from observe_r1.quickstart.questions import make_question
    from observe_r1.quickstart.scenes import paint

    for name, language in (("mathverse.py", "python"), ("mathverse.yaml", "yaml")):
        (block,) = re.findall(rf"```{language}\n(# {name}\n.*?)```", DOCS, flags=re.DOTALL)
        (tmp_path / name).write_text(block)
    assert len((tmp_path / "mathverse.py").read_text().splitlines()) < 40
    rows = []
    for number in range(12):
        question = make_question("held_out", 3, number)
        buffer = pa.BufferOutputStream()
        paint(question.shapes).save(buffer, format="PNG")
        rows.append(
            {
                "sample_index": str(number),
                "problem_version": ("Text Dominant", "Vision Only")[number % 2],
                "query_wo": question.text,
                "image": {"bytes": buffer.getvalue().to_pybytes(), "path": None},
                "answer": question.response.answer,
                "question_type": "free-form",
                "metadata": {"subject": question.family},
            }
        )
    (tmp_path / "data/mathverse/data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data/mathverse/data/testmini-00000-of-00001.parquet")
    run("validate", *SHORT, f"--data.ladder={tiny_ladder}", "--config=mathverse.yaml")
    result = figures(version(tmp_path), "mathverse", "validate")
    saved = predictions(version(tmp_path), "mathverse", "validate")
    right = sum(p.verdict.extraction == p.item.answer for p in saved)
    assert result["scores"]["strict"]["overall"]["correct"] == right > 2
    assert set(result["scores"]["strict"]["version"]) == {"Text Dominant", "Vision Only"}
    file = version(tmp_path) / "evaluation/mathverse/validate.jsonl"
    assert "--benchmark mathverse.MathVerse" in run("score", file, expect=1)
    assert f"{right} / 12" in run("score", file, "--benchmark=mathverse.MathVerse")


def test_the_overlay_goes_behind_an_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The experiment keeps its callbacks; the checkpoint looks at the steps that are evaluated."""
    configs = [locate_config(f"--config={name}") for name in ("quickstart.yaml", "evaluation/mathvista_mmmu.yaml")]
    monkeypatch.setattr(sys, "argv", ["observe-r1", *configs, "--trainer.accelerator=cpu"])
    cli = LightningCLI(ObserveR1, NeuraLadderDataModule, subclass_mode_data=True, run=False, save_config_callback=None)
    callbacks = cli.trainer.callbacks  # type: ignore[attr-defined]
    (evaluation,) = (callback for callback in callbacks if isinstance(callback, BenchmarkEvaluation))
    (checkpoint,) = (c for c in callbacks if isinstance(c, ModelCheckpoint) and c.monitor == "mathvista/accuracy")
    assert [type(benchmark) for benchmark in evaluation.benchmarks] == [MathVista, MMMU]
    assert checkpoint.mode == "max"
    assert checkpoint._every_n_train_steps == evaluation.every_n_steps
    assert any(isinstance(callback, RewardLogger) for callback in callbacks)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"benchmarks": []}, "at least one"),
        ({"benchmarks": [MMMU(), MMMU("elsewhere")]}, "each name once"),
        ({"every_n_steps": -1}, "every_n_steps is -1"),
        ({"max_samples": 0}, "max_samples 0"),
        ({"questions_per_batch": 0}, "questions_per_batch is 0"),
        ({"on_error": "ignore"}, "choose warn or raise"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_settings_are_checked(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        BenchmarkEvaluation(**{"benchmarks": [MathVista()], **options})


@pytest.mark.slow
def test_missing_data_end_the_run_at_its_start(run: Any, tmp_path: Path, tiny_ladder: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "own.yaml").write_text(own("Failing", tmp_path / "nowhere"))
    output = run("fit", *SHORT, f"--data.ladder={tiny_ladder}", "--config=own.yaml", expect=1)
    assert "failing: no file or directory" in output
    assert "Dry run" not in output
