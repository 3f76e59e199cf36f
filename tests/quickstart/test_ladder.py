"""The quick-start ladder: measured by rollouts, in curriculum order, complete or not there."""

from __future__ import annotations

import subprocess
import sys

import pytest

from observe_r1.ladder.curriculum import PAPER_MIXING
from observe_r1.ladder.reader import LadderDataset
from observe_r1.quickstart.ladder import HELD_OUT, build_quickstart_ladder
from observe_r1.quickstart.questions import make_question
from observe_r1.quickstart.sampling import Answered


class EveryThird:
    """Answers each question rightly in as many samples as its number modulo three says."""

    def __call__(self, prompts, n):
        rows = []
        for prompt in prompts:
            n_right = int(prompt.id.rpartition("-")[2]) % 3
            right = f"<observe>a</observe><think>b</think><answer>{prompt.gold.answer}</answer>"
            rows.append([Answered(right if sample < n_right else "no idea", 5 + sample) for sample in range(n)])
        return rows


def test_difficulty_is_measured_and_orders_the_ladder(tmp_path):
    manifest = build_quickstart_ladder(
        tmp_path / "ladder", n_train=30, n_held_out=6, n_rollouts=4, sampler=EveryThird()
    )
    assert manifest.levels == {"0.5": 10, "0.75": 10, "1": 10}
    assert manifest.built["n_rollouts"] == 4
    ladder = LadderDataset(tmp_path / "ladder")
    prompts = [ladder[position] for position in range(len(ladder))]
    assert sorted(int(prompt.id.rpartition("-")[2]) for prompt in prompts) == list(range(30))
    assert all(prompt.difficulty == 1 - prompt.n_correct / 4 for prompt in prompts)
    assert all(prompt.complexity == 6.5 and prompt.n_rollouts == 4 for prompt in prompts)
    stages = [prompt.stage for prompt in prompts]
    assert stages == sorted(stages)
    assert set(stages) <= set(PAPER_MIXING.stages)


def test_without_mixing_the_levels_are_kept_apart(tmp_path):
    build_quickstart_ladder(
        tmp_path / "ladder", n_train=12, n_held_out=3, n_rollouts=4, sampler=EveryThird(), mixing=None
    )
    ladder = LadderDataset(tmp_path / "ladder")
    assert [ladder[position].difficulty for position in range(12)] == [0.5] * 4 + [0.75] * 4 + [1.0] * 4


def test_held_out_questions_are_other_questions_and_measured_too(tmp_path):
    build_quickstart_ladder(tmp_path / "ladder", n_train=6, n_held_out=6, n_rollouts=2, sampler=EveryThird())
    held_out = LadderDataset(tmp_path / "ladder" / HELD_OUT)
    assert [held_out[i].id for i in range(6)] == [make_question("held_out", 0, i).id for i in range(6)]
    assert all(held_out[i].difficulty is not None for i in range(6))


def test_the_shipped_policy_measures_its_own_ladder(tmp_path):
    manifest = build_quickstart_ladder(tmp_path / "ladder", n_train=48, n_held_out=6)
    assert manifest.samples == 48
    assert len(manifest.levels) > 2


@pytest.mark.parametrize("name", ["n_train", "n_held_out", "n_rollouts"])
def test_numbers_below_one_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} is 0"):
        build_quickstart_ladder(tmp_path / "ladder", sampler=EveryThird(), **{name: 0})
    assert not list(tmp_path.iterdir())


def test_a_failed_build_leaves_nothing_behind(tmp_path):
    def fail(prompts, n):
        raise RuntimeError("no answer")

    with pytest.raises(RuntimeError, match="no answer"):
        build_quickstart_ladder(tmp_path / "ladder", n_train=6, n_held_out=6, sampler=fail)
    assert not list(tmp_path.iterdir())


def test_nodes_that_share_a_disk_may_make_it_at_the_same_time(tmp_path):
    prepare = "from observe_r1.datamodules import QuickstartDataModule as Data; Data('ladder', 8, 2).prepare_data()"
    nodes = [subprocess.Popen([sys.executable, "-c", prepare], cwd=tmp_path) for _ in range(2)]
    assert [node.wait(timeout=600) for node in nodes] == [0, 0]
    assert len(LadderDataset(tmp_path / "ladder")) == 8
    assert [path.name for path in tmp_path.iterdir()] == ["ladder"]  # what came too late is gone
