"""The reward for a right answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from observe_r1.answers import (
    MAX_ANSWER_CHARACTERS,
    Gold,
    answer_content,
    check_gold,
    fast_verdict,
    gold_kind,
    symbolic_gold,
    symbolic_prediction,
)
from observe_r1.rewards.base import CorrectnessReward
from observe_r1.rewards.verification import AnswerVerifier, Comparison, Verdict

if TYPE_CHECKING:
    from observe_r1.experience import Completion, Prompt, PromptGroup


class AccuracyReward(CorrectnessReward):
    """1 for a completion whose last `<answer>` block equals the gold answer, else 0.

    Text, option letters and numbers are compared here (`fast_verdict`), the rest by math-verify in worker processes
    that start when the first answer needs them. Whether a gold can be judged is one decision for its whole group: if
    math-verify cannot read it, all completions of the group are left out, including those equal to it letter by letter.

    Args:
        weight: 1 in Observe-R1 (arXiv 2505.12432).
        workers: processes that run math-verify.
        timeout_seconds: CPU time for one comparison.
        batch_timeout_seconds: wall time for all comparisons of a batch, beside 0.02 s for each.
        memory_bytes: address space of a process.
        untagged: what a completion without an answer block is: `wrong`, or judged as a `whole`, for a policy that was
            told to give nothing but the answer.
        name: key of the score in logs.
    """

    def __init__(
        self,
        weight: float = 1.0,
        workers: int = 2,
        timeout_seconds: float = 1.0,
        batch_timeout_seconds: float = 6.0,
        memory_bytes: int = 2 * 1024**3,
        untagged: Literal["wrong", "whole"] = "wrong",
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        self.untagged = untagged
        self.verifier = AnswerVerifier(workers, timeout_seconds, batch_timeout_seconds, memory_bytes)

    def score(self, prompt: Prompt, completion: Completion) -> float:
        return float(_group_verdicts(self.verdicts([(prompt.gold, completion.text)]))[0] or False)

    def judge_groups(self, groups: Sequence[PromptGroup]) -> list[list[bool | None]]:
        pairs = [(group.prompt.prompt.gold, completion.text) for group in groups for completion in group.completions]
        verdicts = iter(self.verdicts(pairs))
        return [_group_verdicts([next(verdicts) for _ in group.completions]) for group in groups]

    def verdicts(self, pairs: Sequence[tuple[Gold, str]]) -> list[Verdict]:
        """The verdict on each completion text against its gold, counted."""
        answers_given = [(gold, self._answer(text)) for gold, text in pairs]
        verdicts = [_quick_verdict(gold, answer) for gold, answer in answers_given]
        open_pairs = [i for i, verdict in enumerate(verdicts) if verdict is None]
        answers = self.verifier.verify([_comparison(*answers_given[i]) for i in open_pairs])
        for i, verdict in zip(open_pairs, answers, strict=True):
            # an option that math-verify cannot read can still be named by its letter, so the others stay judged
            unreadable_option = verdict is Verdict.UNPARSEABLE_GOLD and gold_kind(pairs[i][0]) == "choice"
            verdicts[i] = Verdict.WRONG if unreadable_option else verdict
        decided = [verdict for verdict in verdicts if verdict is not None]
        self.counts.update(verdict.value for verdict in decided)
        return decided

    def _answer(self, text: str) -> str:
        content = answer_content(text)
        if content is None and self.untagged == "whole":
            return text.strip()
        return content or ""

    def close(self) -> None:
        self.verifier.close()


def gold_problems(golds: Sequence[Gold], verifier: AnswerVerifier) -> list[str | None]:
    """Why each gold cannot be judged with, None for a usable one: for importers, before shards are written.

    Beside `check_gold`, math-verify must read each `math` gold and find it equal to itself within the limits.
    """
    problems = [check_gold(gold) for gold in golds]
    symbolic = [i for i, gold in enumerate(golds) if gold_kind(gold) == "math"]
    comparisons = [Comparison(symbolic_gold(golds[i]), symbolic_gold(golds[i])) for i in symbolic]
    for i, verdict in zip(symbolic, verifier.verify(comparisons), strict=True):
        if verdict is not Verdict.CORRECT:
            problems[i] = f"math-verify cannot compare {golds[i].answer!r} with itself: {verdict.value}"
    return problems


def _quick_verdict(gold: Gold, answer: str) -> Verdict | None:
    """What can be said without math-verify."""
    if check_gold(gold) is not None:
        return Verdict.UNPARSEABLE_GOLD
    if not answer:
        return Verdict.NO_ANSWER
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return Verdict.TOO_LONG
    right = fast_verdict(gold, answer)
    return None if right is None else Verdict.CORRECT if right else Verdict.WRONG


def _comparison(gold: Gold, answer: str) -> Comparison:
    return Comparison(symbolic_gold(gold), symbolic_prediction(answer), gold.precision)


def _group_verdicts(verdicts: Sequence[Verdict]) -> list[bool | None]:
    if Verdict.UNPARSEABLE_GOLD in verdicts:
        return [None] * len(verdicts)
    return [verdict is Verdict.CORRECT for verdict in verdicts]
