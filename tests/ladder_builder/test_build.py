"""Building a ladder with the real engine and the shipped policy: every filter, every interruption, every rank."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from observe_r1.answers import Gold
from observe_r1.encoding import PromptOptions
from observe_r1.ladder.curriculum import Mixing
from observe_r1.ladder.manifest import Manifest
from observe_r1.ladder.reader import LadderDataset
from observe_r1.ladder.screening import ContaminationOptions
from observe_r1.ladder.selection import LabelNoiseOptions
from observe_r1.ladder_builder.build import BuildReport, SimpleQuestions, build_ladder
from observe_r1.ladder_builder.measuring import BuildTrainer, Rollouts
from observe_r1.loading import PolicyOptions
from observe_r1.rollout import SamplingOptions

Make = Callable[..., Path]


def build(sources: list[Path], output: Path, **options: Any) -> BuildReport:
    rollouts = Rollouts(
        PolicyOptions("quickstart"), PromptOptions(system_prompt=None), SamplingOptions(4, max_new_tokens=32)
    )
    trainer = BuildTrainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
    return build_ladder(sources, output, rollouts, trainer, questions_per_block=8, **options)


def digests(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def dropped(output: Path) -> dict[int, str]:
    lines = [json.loads(line) for line in (output / "dropped.jsonl").read_text().splitlines()]
    return {line["position"]: line["reason"] for line in lines}


def test_difficulty_is_measured_and_orders_the_ladder(tmp_path: Path, questions: Make) -> None:
    report = build([questions("shapes", 40)], tmp_path / "ladder", holdout=4, label_noise=LabelNoiseOptions("none"))
    assert (report.questions, report.samples, report.held_out) == (40, 36, 4)
    prompts = list(LadderDataset(tmp_path / "ladder"))
    held_out = list(LadderDataset(tmp_path / "ladder" / "held_out"))
    assert len({prompt.id for prompt in [*prompts, *held_out]}) == 40
    for prompt in [*prompts, *held_out]:
        assert prompt.n_rollouts == 4
        assert prompt.difficulty == 1 - prompt.n_correct / 4
        assert 5 < prompt.complexity <= 32
    stages = [prompt.stage for prompt in prompts]
    assert stages == sorted(stages)
    assert len({prompt.difficulty for prompt in prompts}) >= 3
    built = Manifest.load(tmp_path / "ladder").built
    assert built["rollouts"]["sampling"]["group_size"] == 4
    assert str(tmp_path) not in json.dumps(built)  # the bytes do not depend on where the ladder is


def test_every_reason_to_drop_a_question(tmp_path: Path, questions: Make) -> None:
    """Golds, duplicates and benchmarks, found among two sources; the rest is measured."""
    first = questions("first", 24, golds={0: Gold("9^{9^{9^9}}", "math"), 3: Gold("purple", "text")})
    # four questions again, one of them with another answer; and one that a benchmark has
    second = questions("second", 8, start=20, golds={2: Gold("another", "text")})
    benchmark = questions("benchmark", 1, start=26)
    report = build(
        [first, second],
        tmp_path / "ladder",
        contamination=ContaminationOptions([str(benchmark)]),
        label_noise=LabelNoiseOptions("none"),
        mixing="none",
    )
    assert dropped(tmp_path / "ladder") == {
        0: "gold_unparseable",
        24: "duplicate",
        25: "duplicate",
        26: "contradicting_duplicate",
        27: "duplicate",
        30: "contaminated",
    }
    assert report.samples == 26
    ids = {prompt.id for prompt in LadderDataset(tmp_path / "ladder")}
    assert {id.partition("/")[0] for id in ids} == {"first", "second"}
    assert Manifest.load(tmp_path / "ladder").built["dropped"] == report.dropped


def test_what_is_answered_directly_is_too_simple(tmp_path: Path, questions: Make) -> None:
    source = questions("shapes", 24)
    simple = SimpleQuestions(PolicyOptions("quickstart"), max_new_tokens=32)
    report = build([source], tmp_path / "ladder", simple=simple, label_noise=LabelNoiseOptions("none"))
    journal = (tmp_path / "ladder.work/2-simple/blocks.jsonl").read_text().splitlines()
    records = [record for line in journal for record in json.loads(line)["records"]]
    right = {record["position"] for record in records if record["n_correct"]}
    assert 0 < len(right) < 24
    assert all(record["lengths"] and len(record["completions"]) == 1 for record in records)
    assert dropped(tmp_path / "ladder") == dict.fromkeys(sorted(right), "simple_question")
    assert report.samples == 24 - len(right)


def test_rollouts_are_kept_when_what_follows_changes(tmp_path: Path, questions: Make) -> None:
    source = questions("shapes", 24)
    build([source], tmp_path / "one", work=tmp_path / "work", mixing="none")
    before = (tmp_path / "work/3-rollouts/blocks.jsonl").stat().st_mtime_ns
    halves = Mixing((0.0, 1.0), (0.25, 0.75), ((0.8, 0.2), (0.2, 0.8)))
    options = {"label_noise": LabelNoiseOptions("either", difficulty=1.0, complexity_quantile=0.2), "max_samples": 9}
    report = build([source], tmp_path / "two", work=tmp_path / "work", mixing=halves, **options)
    assert (tmp_path / "work/3-rollouts/blocks.jsonl").stat().st_mtime_ns == before
    assert {prompt.stage for prompt in LadderDataset(tmp_path / "two")} <= {0.25, 0.75}
    assert report.samples == 9
    assert {"brief", "hard", "over_max_samples"} == set(report.dropped)
    assert Manifest.load(tmp_path / "two").built["mixing"]["shares"] == [[0.8, 0.2], [0.2, 0.8]]


def test_work_of_other_settings_is_refused(tmp_path: Path, questions: Make) -> None:
    source = questions("shapes", 8)
    build([source], tmp_path / "one", work=tmp_path / "work")
    with pytest.raises(ValueError, match=r"3-rollouts was computed with other settings.*seed was 0, now 1"):
        build([source], tmp_path / "two", work=tmp_path / "work", seed=1)
    with pytest.raises(ValueError, match="one exists already"):
        build([source], tmp_path / "one", work=tmp_path / "work")


COMMAND = (
    "ladder", "build", "--config=ladder/build_quickstart.yaml", "--rollouts.sampling.group_size=4",
    "--questions_per_block=8", "--trainer.enable_progress_bar=false", "--holdout=5", "--samples_per_shard=16",
    "--simple.policy.pretrained=quickstart", "--simple.max_new_tokens=32",
)  # fmt: skip


KILLED = """
import os, runpy, signal, sys
from pathlib import Path

stage, lines = sys.argv.pop(1), int(sys.argv.pop(1))

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def at_open(event, arguments):
    if event == "open" and str(arguments[0]).endswith(".killed.unfinished/shard-000001.tar"):
        kill()

if stage == "writing":
    sys.addaudithook(at_open)
else:
    from observe_r1.ladder.journal import BlockWriter

    write = BlockWriter.write

    def write_or_die(writer, block, records):
        write(writer, block, records)
        path = Path(writer._file.name)
        if path.parent.name == stage and path.read_bytes().count(b"\\n") == lines:
            os.truncate(path, path.stat().st_size - 9)  # in the middle of this line
            kill()

    BlockWriter.write = write_or_die
runpy.run_module("observe_r1", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_a_build_killed_at_every_stage_gives_the_same_bytes(
    tmp_path: Path, questions: Make, command_line: Callable[[Path], Any]
) -> None:
    source = questions("shapes", 160)
    run = command_line(tmp_path)
    run(*COMMAND, f"--sources=[{source}]", "--output=whole")

    work = tmp_path / "killed.work"
    arguments = [*COMMAND, f"--sources=[{source}]", "--output=killed"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    # while the line of this number is written; with the second shard
    moments = [("1-screening", 2), ("2-simple", 2), ("2-simple", 5), ("3-rollouts", 1), ("3-rollouts", 4)]
    moments.append(("writing", 0))
    for stage, lines in moments:
        command = [sys.executable, "-c", KILLED, stage, str(lines), *arguments]
        killed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=400, check=False)
        assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-4000:]
        assert not (tmp_path / "killed").exists()
    assert (tmp_path / ".killed.unfinished/shard-000000.tar").exists()
    run(*arguments)
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    for stage in ("1-screening", "2-simple", "3-rollouts"):
        assert digests(work / stage) == digests(tmp_path / "whole.work" / stage)
    assert not list(tmp_path.glob(".killed*"))


@pytest.mark.slow
def test_two_ranks_give_the_bytes_of_one(tmp_path: Path, questions: Make, command_line: Callable[[Path], Any]) -> None:
    source = questions("shapes", 60)
    run = command_line(tmp_path)
    run(*COMMAND, f"--sources=[{source}]", "--output=one")
    run(*COMMAND, f"--sources=[{source}]", "--output=two", "--trainer.devices=2", "--trainer.strategy=ddp")
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert digests(tmp_path / "one.work") == digests(tmp_path / "two.work")
