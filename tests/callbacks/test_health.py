"""Sick runs through the real command line: what is said, where it is written down, how they stop and go on."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
DOCS = Path(__file__).parent.parent.parent / "docs" / "curves.md"
SICK = (
    *("fit", "--config=quickstart.yaml", "--trainer.log_every_n_steps=1", "--trainer.num_sanity_val_steps=0"),
    *("--trainer.limit_val_batches=0", "--model.sampling={group_size: 4, max_new_tokens: 20}"),
    *("--data.class_path=observe_r1.datamodules.NeuraLadderDataModule", "--data.prompts_per_rollout=8"),
    "--model.rollout=sick_runs.NoisyRollout",  # its log-probs are 0.16 off
)


@pytest.fixture
def run(tmp_path: Path, command_line: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command line in a directory that has the sick parts."""
    (tmp_path / "sick_runs.py").symlink_to(BENCHMARKS / "sick_runs.py")
    return command_line(tmp_path)


def directories(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "runs" / "quickstart").iterdir())


@pytest.mark.slow
def test_a_sick_run_stops_with_a_checkpoint_and_goes_on_from_it(run: Any, tmp_path: Path, tiny_ladder: Path) -> None:
    data = f"--data.ladder={tiny_ladder}"
    output = run(*SICK, data, "--model.on_sick=stop", expect=1)
    (directory,) = directories(tmp_path)
    assert re.search(r"Sick: sampler_mismatch at step 2: log-probs of sampler and trainer differ by 0\.1\d", output)
    assert "observe-r1: stopped. sampler_mismatch at step 2" in output
    assert "Traceback" not in output
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["status"].startswith("SickRun: sampler_mismatch at step 2")
    (warning,) = summary["health"]
    assert (warning["name"], warning["step"], warning["until"]) == ("sampler_mismatch", 2, None)
    assert "differ by 0.1" in warning["message"]
    assert "VLLMWeightSync" in warning["advice"]
    # where it stopped and with what the checkpoint goes on; a warning that was given is not given again
    checkpoint = directory / "checkpoints" / "sick.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 2
    output = run(*SICK, data, "--model.on_sick=stop", f"--ckpt_path={checkpoint}")
    assert "Sick:" not in output
    resumed = directories(tmp_path)[-1]
    summary = json.loads((resumed / "summary.json").read_text())
    assert (summary["status"], summary["optimizer_steps"]) == ("finished", 6)
    assert [warning["step"] for warning in summary["health"]] == [2]


@pytest.mark.slow
def test_a_warning_is_said_logged_and_marked(run: Any, tmp_path: Path, tiny_ladder: Path) -> None:
    """With a rule changed and another left out; in a log that the user has set up, too."""
    (block,) = re.findall(r"```python\n(# mine_health.py\n.*?)```", DOCS.read_text(), flags=re.DOTALL)
    (tmp_path / "mine_health.py").write_text(block)
    (tmp_path / "mine.py").write_text(
        "import logging\nlogging.basicConfig(filename='log.txt', level='WARNING')\n"
        "from dataclasses import dataclass\nfrom typing import ClassVar\n"
        "from observe_r1.health.rule import Reading, Rule\n\n"
        "@dataclass(frozen=True)\nclass Odd(Rule):\n    name: ClassVar[str] = 'odd_rewards'\n"
        "    advice: ClassVar[str] = 'Have tea.'\n"
        "    def read(self, figures, memory):\n"
        "        return Reading(True, False, 'a [bracket]') if 'rollout/reward' in figures else None\n"
    )
    output = run(
        *SICK,
        f"--data.ladder={tiny_ladder}",
        *(
            "--health.zero_advantages.above=0.01",
            "--health.zero_advantages.well_below=0",
            "--health.zero_advantages.window=1",
        ),
        *("--health.sampler_mismatch=null", "--health.own+=mine.Odd", "--health.own.after=2"),
        *("--health.own+=mine_health.FormatLost", "--health.own.below=0.99", "--health.own.after=1"),
    )
    assert output.count("Sick: zero_advantages at step 4: ") == 1
    assert output.count("Sick: odd_rewards at step 2: a [bracket].") == 1
    assert "Have tea." in output
    assert re.search(r"Sick: format_lost at step 0: \d\d% have the format", output)
    assert "sampler_mismatch at" not in output
    assert (
        "health       format_lost at step 0, odd_rewards at step 2, zero_advantages at step 4: see docs/curves.md"
        in output
    )
    log = (tmp_path / "log.txt").read_text()
    assert re.search(r"WARNING:observe_r1.callbacks.health:zero_advantages at step 4", log)
    (directory,) = directories(tmp_path)
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    assert [event.value for event in events.Scalars("health/zero_advantages")] == [0, 0, 1]
    assert [event.value for event in events.Scalars("health/kl_blow_up")] == [0, 0, 0]
    assert "health/sampler_mismatch" not in events.Tags()["scalars"]
    (text,) = events.Tensors("health/zero_advantages/text_summary")
    assert b"all right or all wrong" in text.tensor_proto.string_val[0]
    assert 0 < events.Scalars("rollout/repeated")[0].value < 0.5


@pytest.mark.slow
def test_two_ranks_stop_together(run: Any, tmp_path: Path, tiny_ladder: Path) -> None:
    ranks = ("--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp")
    output = run(*SICK, *ranks, f"--data.ladder={tiny_ladder}", "--model.on_sick=stop", expect=1)
    assert output.count("Sick: sampler_mismatch at step 2") == 1  # the first rank says it
    assert output.count("observe-r1: stopped. sampler_mismatch at step 2") == 2
    (directory,) = directories(tmp_path)
    assert torch.load(directory / "checkpoints" / "sick.ckpt", weights_only=True)["global_step"] == 2
    assert os.listdir(directory / "checkpoints") == ["sick.ckpt"]


@pytest.mark.slow
def test_lost_weights_are_not_saved(run: Any, tmp_path: Path, tiny_ladder: Path) -> None:
    """A learning rate that no weight survives."""
    settings = ("--model.rollout=observe_r1.rollout.HFRollout", "--model.optimizer.lr=1.0e+20", "--model.on_sick=stop")
    output = run(*SICK, *settings, f"--data.ladder={tiny_ladder}", "--trainer.gradient_clip_val=null", expect=None)
    (directory,) = directories(tmp_path)
    status = json.loads((directory / "summary.json").read_text())["status"]
    assert "non_finite" in status, output[-3000:]
    assert not (directory / "checkpoints" / "sick.ckpt").exists()
