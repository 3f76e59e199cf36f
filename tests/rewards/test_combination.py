"""Several rewards as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from observe_r1.answers import Gold
from observe_r1.rewards import AccuracyReward, CorrectnessReward, FormatReward, RewardCombination

GOOD = "<observe>a</observe><think>b</think><answer>3</answer>"
WRONG = GOOD.replace("3", "4")
BARE = "<answer>3</answer>"


def test_parts_sum_and_correctness(make_group: Any) -> None:
    combination = RewardCombination([AccuracyReward(), FormatReward()])
    first, second = combination.score([make_group(Gold("3"), [GOOD, WRONG, BARE]), make_group(Gold("4"), [GOOD, ""])])
    assert first.parts == {"accuracy": [1, 0, 1], "format": [1, 1, 0]}
    assert first.reward == [1.5, 0.5, 1.0]
    assert first.correct == [True, False, True]
    assert first.judged == [True] * 3
    assert second.reward == [0.5, 0.0]
    assert combination.take_counts() == Counter(correct=2, wrong=2, no_answer=1)
    assert not combination.take_counts()


@pytest.mark.parametrize("weight", [-1.0, 0.0, 7.0])
def test_correctness_does_not_depend_on_weights(weight: float, make_group: Any) -> None:
    scores = RewardCombination([FormatReward(weight=3), AccuracyReward(weight)]).score(
        [make_group(Gold("3"), [GOOD, WRONG])]
    )
    assert scores[0].correct == [True, False]
    assert scores[0].reward == [3 + weight, 3]


def test_a_gold_that_cannot_be_judged_is_left_out(make_group: Any) -> None:
    combination = RewardCombination([AccuracyReward(), FormatReward()])
    (scores,) = combination.score([make_group(Gold(r"\frac{1}{"), [GOOD, "", r"<answer>\frac{1}{</answer>"])])
    assert scores.judged == [False] * 3
    assert scores.correct == [False] * 3
    assert scores.parts["accuracy"] == [0, 0, 0]
    assert combination.take_counts() == Counter(unparseable_gold=3)


def test_no_groups() -> None:
    assert RewardCombination([AccuracyReward()]).score([]) == []


@pytest.mark.parametrize(
    ("rewards", "named"),
    [
        ([], "no rewards.*0 decide.*AccuracyReward"),
        ([FormatReward()], "FormatReward.*0 decide"),
        ([AccuracyReward(), AccuracyReward(name="again")], "2 decide"),
        ([AccuracyReward(), FormatReward(), FormatReward()], "'format'"),
    ],
)
def test_refused_combinations(rewards: Sequence[Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        RewardCombination(rewards)


def test_a_reward_must_score_every_completion(make_group: Any) -> None:
    class Short(CorrectnessReward):
        def score(self, prompt: Any, completion: Any) -> float:
            return 0.0

        def judge_groups(self, groups: Any) -> list[list[bool | None]]:
            return [[True] for _ in groups]

    with pytest.raises(ValueError, match=r"'short'.*\[1\].*\[2\]"):
        RewardCombination([Short()]).score([make_group(Gold("3"), [GOOD, GOOD])])
