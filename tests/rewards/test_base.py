"""What every reward does, the format reward and the overlong penalty."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest

from observe_r1.answers import Gold
from observe_r1.rewards import AccuracyReward, FormatReward, OverlongPenalty, Reward

WELL_FORMED = "<observe>a</observe><think>b</think><answer>3</answer>"


class ShortAnswerReward(Reward):
    """Returns what it is told to."""

    def __init__(self, value: Any = 1.0, **options: Any) -> None:
        super().__init__(**options)
        self.value = value

    def score(self, prompt: Any, completion: Any) -> float:
        return self.value  # type: ignore[no-any-return]


def test_names() -> None:
    assert FormatReward().name == "format"
    assert AccuracyReward().name == "accuracy"
    assert OverlongPenalty(max_length=10, buffer=2).name == "overlong"
    assert ShortAnswerReward().name == "short_answer"
    assert ShortAnswerReward(name="brevity").name == "brevity"


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_weight_must_be_finite(weight: float) -> None:
    with pytest.raises(ValueError, match=str(weight)):
        FormatReward(weight=weight)


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "much"])
def test_a_score_that_is_no_finite_number_is_refused(value: object, make_group: Any) -> None:
    with pytest.raises(ValueError, match=f"'short_answer'.*'sample-7'.*{value}"):
        ShortAnswerReward(value).score_groups([make_group(Gold("3"), ["text"])])


def test_format_reward(make_group: Any) -> None:
    groups = [make_group(Gold("3"), [WELL_FORMED, "3"]), make_group(Gold("3"), [WELL_FORMED])]
    reward = FormatReward()
    assert reward.weight == 0.5
    assert reward.score_groups(groups) == [[1.0, 0.0], [1.0]]


@pytest.mark.parametrize(("tokens", "penalty"), [(0, 0), (6, 0), (7, -0.25), (8, -0.5), (10, -1), (12, -1)])
def test_overlong_penalty(tokens: int, penalty: float, make_group: Any) -> None:
    reward = OverlongPenalty(max_length=10, buffer=4)
    assert reward.score_groups([make_group(Gold("3"), ["word " * tokens])]) == [[penalty]]


@pytest.mark.parametrize(("max_length", "buffer"), [(0, 1), (10, 0), (10, 11)])
def test_overlong_penalty_refuses(max_length: int, buffer: int) -> None:
    with pytest.raises(ValueError, match="tokens"):
        OverlongPenalty(max_length=max_length, buffer=buffer)


def test_rewards_import_neither_torch_nor_sympy() -> None:
    code = "import sys, observe_r1.rewards; print(sorted({'torch', 'sympy', 'math_verify', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
