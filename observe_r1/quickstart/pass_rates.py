"""How often a policy's answers to quick-start questions are right, and in the format."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from observe_r1.experience import Prompt
from observe_r1.quickstart.sampling import Answered, Sampler


def is_well_formed(text: str) -> bool:
    return re.fullmatch(r"<observe>[^<>]*[^<>\s][^<>]*</observe>\s*<think>[^/]+</think>\s*<answer>[^<>]+</answer>", text.strip()) is not None


def is_correct(text: str, prompt: Prompt) -> bool:
    found = re.findall(r"<answer>([^<>]*)</answer>", text)
    return bool(found) and found[-1].strip() == prompt.gold.answer


@dataclass(frozen=True, slots=True)
class Judged:
    """The judged responses to one prompt."""

    prompt: Prompt
    answered: Sequence[Answered]
    n_correct: int
    n_well_formed: int

    @property
    def pass_rate(self) -> float:
        return self.n_correct / len(self.answered)


def judge(sampler: Sampler, prompts: Sequence[Prompt], n: int) -> list[Judged]:
    """Sample `n` responses to each prompt and judge them."""
    return [
        Judged(
            prompt,
            answered,
            sum(is_correct(one.text, prompt) for one in answered),
            sum(is_well_formed(one.text) for one in answered),
        )
        for prompt, answered in zip(prompts, sampler(prompts, n), strict=True)
    ]
