"""How often a policy's answers to quick-start questions are right, and how often they have the format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from observe_r1.answers import Gold, answer_content, fast_verdict, is_well_formed
from observe_r1.experience import Prompt
from observe_r1.ladder.measurement import Measurement
from observe_r1.quickstart.sampling import Answered, Sampler


@dataclass(frozen=True, slots=True)
class Judged:
    """The judged responses to one prompt."""

    answered: Sequence[Answered]
    n_correct: int
    n_well_formed: int

    @property
    def pass_rate(self) -> float:
        return self.n_correct / len(self.answered)

    @property
    def measurement(self) -> Measurement:
        return Measurement(self.n_correct, [one.n_tokens for one in self.answered])


def is_correct(text: str, gold: Gold) -> bool:
    """Whether the answer block holds the gold answer. Quick-start golds are words or whole numbers: no algebra."""
    content = answer_content(text)
    return content is not None and fast_verdict(gold, content) is True


def judge(sampler: Sampler, prompts: Sequence[Prompt], n: int) -> list[Judged]:
    """Sample `n` responses to each prompt and judge them."""
    return [
        Judged(
            answered,
            sum(is_correct(one.text, prompt.gold) for one in answered),
            sum(is_well_formed(one.text) for one in answered),
        )
        for prompt, answered in zip(prompts, sampler(prompts, n), strict=True)
    ]
