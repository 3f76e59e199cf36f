"""Values of the wrong type or out of their range."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from mistake import MINE, Mistake, file

MISTAKES = [
    Mistake("yaml", MINE, ("line 2", "mine.yaml"), file("mine.yaml", "model:\n  sampling: {group_size: 4\n"), code=2),
    Mistake("word for a number", ("--model.sampling.group_size=four",), ("an int", "four"), code=2),
    Mistake("word for a list", ("--model.policy.freeze='*visual*'",), ("list", "visual", "[first, second]"), code=2),
    Mistake("choice", ("--model.objective.name=ppo",), ("ppo", "'grpo'", "'dr_grpo'"), code=2),
    Mistake("precision", ("--trainer.precision=fp16",), ("fp16", "'16-true'", "'bf16-mixed'"), code=2),
    *(
        Mistake(f"{option}={value}", (f"--{option}={value}",), expected)
        for option, value, *expected in (
            ("model.sampling.group_size", 0, "group_size is 0", "at least 1"),
            ("model.sampling.max_new_tokens", -1, "max_new_tokens is -1", "at least 1"),
            ("model.sampling.temperature", -1, "temperature is -1.0", "0 for greedy"),
            ("model.sampling.top_p", 0, "top_p is 0.0", "(0, 1]"),
            ("model.kl.coefficient", -1, "coefficient is -1.0", "0 for no KL"),
            ("model.advantage.bonus", -1, "bonus is -1.0", "0 for none"),
            ("model.updates.steps_per_rollout", 0, "steps_per_rollout is 0", "at least 1"),
            ("model.policy.logprob_chunk_tokens", 0, "logprob_chunk_tokens is 0", "1 or more"),
            ("model.prompt.max_pixels", -5, "max_pixels is -5", "or null"),
            ("model.objective.epsilon_low", -1, "epsilon_low", "≥ 0"),
            ("data.prompts_per_rollout", 0, "data.prompts_per_rollout is 0", "at least 1"),
            ("data.workers", -1, "data.workers is -1", "at least 0"),
            ("data.questions_per_batch", 0, "data.questions_per_batch is 0", "at least 1"),
            ("data.max_image_pixels", 0, "data.max_image_pixels is 0", "at least 1"),
        )
    ),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_is_named(mistake: Mistake, told: Callable[[Mistake], None]) -> None:
    told(mistake)
