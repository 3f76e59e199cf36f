"""Which completions are correct, from their text to the verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from observe_r1.answers import Gold
from observe_r1.rewards import AccuracyReward, AnswerVerifier, gold_problems


@pytest.fixture(scope="module")
def reward() -> Iterator[AccuracyReward]:
    accuracy = AccuracyReward(timeout_seconds=20, batch_timeout_seconds=300)  # others may want the cores
    yield accuracy
    accuracy.close()


CHOICES = ("10 cm", r"$\frac{\sqrt{3}}{2}$", r"$\overline{\frac$")


@pytest.mark.parametrize(
    ("gold", "answer", "verdict"),
    [
        (Gold("0.50"), "0.5", True),
        (Gold("C"), "12 cm", False),
        (Gold("red"), "blue", False),
        (Gold(r"\sqrt{2}"), r"\frac{2}{\sqrt{2}}", True),
        (Gold(r"\sqrt{2}"), "√2", True),
        (Gold(r"\sqrt{2}"), "1.41", False),
        (Gold(r"\sqrt{2}", precision=2), "1.41", True),
        (Gold(r"\sqrt{2}", precision=2), "1.42", False),
        (Gold("1.41", precision=2), r"\sqrt{2}", True),
        (Gold("1.41"), r"\sqrt{2}", False),
        (Gold("3"), r"\sqrt{9}", True),
        (Gold("3"), "x = 3", True),
        (Gold("3"), "3 or 4", False),
        (Gold("3"), "3, 4", False),
        (Gold("2.5"), r"\frac{\sqrt{25}}{2}", True),
        (Gold("50%"), r"\frac{\sqrt{4}}{4}", True),
        (Gold("x^2+2x+1"), "(x+1)^2", True),
        (Gold("x^2+2x+1"), "(x+1)^3", False),
        (Gold(r"2\pi"), "2π", True),
        (Gold("2pi"), r"2\pi", True),
        (Gold("1, 2"), "2, 1", True),
        (Gold(r"(-\infty, 3]"), r"(-∞,3]", True),
        (Gold("3:4"), "6:8", True),
        (Gold("x>3"), "3<x", True),
        (Gold(r"\sqrt{2}"), r"\frac{1}{", False),
        (Gold(r"\sqrt{2}"), "I do not know", False),
        (Gold("B", choices=CHOICES), r"\sqrt{3}/2", True),
        (Gold("B", choices=CHOICES), r"\sqrt{3}/3", False),
        (Gold("C", choices=CHOICES), "C", True),
        (Gold("C", choices=CHOICES), r"\sqrt{3}/3", False),
    ],
)
def test_verdicts(reward: AccuracyReward, make_group: Any, gold: Gold, answer: str, verdict: bool) -> None:
    assert reward.judge_groups([make_group(gold, [f"<answer>{answer}</answer>"])]) == [[verdict]]
    assert reward.score_groups([make_group(gold, [f"<answer>{answer}</answer>"])]) == [[float(verdict)]]


def test_only_the_last_answer_block_counts(reward: AccuracyReward, make_group: Any) -> None:
    texts = [
        "3",
        "<answer>4</answer><answer>3</answer>",
        "<answer>3</answer><answer>4</answer>",
        "<answer>3",
        "<answer> </answer>",
    ]
    reward.take_counts()
    assert reward.judge_groups([make_group(Gold("3"), texts)]) == [[False, True, False, False, False]]
    assert reward.take_counts() == Counter(no_answer=3, correct=1, wrong=1)


def test_one_unreadable_gold_leaves_its_group_out_and_no_other(reward: AccuracyReward, make_group: Any) -> None:
    answers = [r"<answer>\sqrt{3}</answer>", r"<answer>1.\overline{3}</answer>"]
    groups = [make_group(Gold(r"1.\overline{3}"), answers), make_group(Gold(r"\sqrt{3}"), answers[:1])]
    reward.take_counts()
    assert reward.judge_groups(groups) == [[None, None], [True]]
    assert reward.take_counts()["unparseable_gold"] >= 1
    assert reward.score_groups(groups) == [[0.0, 0.0], [1.0]]


def test_score_of_one_completion(reward: AccuracyReward, make_group: Any) -> None:
    group = make_group(Gold(r"\sqrt{3}"), [r"<answer>\frac{3}{\sqrt{3}}</answer>"])
    assert reward.score(group.prompt.prompt, group.completions[0]) == 1.0


def test_processes_start_only_for_answers_that_need_them(make_group: Any) -> None:
    lazy = AccuracyReward()
    assert lazy.judge_groups([make_group(Gold("3"), ["<answer>3</answer>", "<answer>4</answer>"])]) == [[True, False]]
    assert lazy.verifier.processes == []
    lazy.close()


def test_problems_of_golds() -> None:
    golds = [
        Gold("3"),
        Gold("red"),
        Gold("B", choices=CHOICES),
        Gold(r"\sqrt{2}"),
        Gold(r"\frac{1}{"),
        Gold(r"1.\overline{3}"),
        Gold("9^{9^{9^9}}"),
        Gold("1/0"),
    ]
    verifier = AnswerVerifier(workers=1)
    problems = gold_problems(golds, verifier)
    verifier.close()
    assert [problem is None for problem in problems] == [True] * 4 + [False] * 4
    assert r"1.\\overline{3}" in str(problems[5])


def test_a_completion_without_tags_can_be_judged_as_a_whole() -> None:
    """For a policy that was told to give nothing but the answer; tags still count where there are some."""
    pairs = [(Gold("3"), " 3.\n"), (Gold("3"), "<answer>4</answer> 3"), (Gold("3"), " "), (Gold("B"), "(B)")]
    whole = AccuracyReward(untagged="whole").verdicts(pairs)
    assert [verdict.value for verdict in whole] == ["correct", "wrong", "no_answer", "correct"]
    tagged = AccuracyReward().verdicts(pairs)
    assert [verdict.value for verdict in tagged] == ["no_answer", "wrong", "no_answer", "no_answer"]
