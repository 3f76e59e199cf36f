"""Values that are fine each, and not together or not on this machine."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from mistake import MINE, Mistake, config

MISTAKES = [
    Mistake("group of one", ("--model.sampling.group_size=1",), ("group_size is 1", "Use 2 or more")),
    Mistake(
        "too many micro-batches",
        ("--trainer.accumulate_grad_batches=100",),
        ("32 completions", "8 prompts × 4", "accumulate_grad_batches (100)", "smaller"),
    ),
    Mistake(
        "answers too long", ("--model.sampling.max_new_tokens=100000",), ("is 100000", "1024 positions", "use less")
    ),
    Mistake("dr_grpo", ("--model.objective.name=dr_grpo",), ("dr_grpo", "set it to max_new_tokens")),
    Mistake("no gpu", ("--trainer.accelerator=gpu",), ("gpu", "--trainer.accelerator cpu", "torch")),
    Mistake("too many gpus", ("--trainer.accelerator=cuda", "--trainer.devices=2"), ("['cpu']", "fewer")),
    Mistake("fsdp", ("--trainer.strategy=fsdp",), ("`fsdp`", "fsdp2")),
    Mistake(
        "two judges", ("--model.rewards.b=observe_r1.rewards.AccuracyReward",), ("2 decide", "AccuracyReward` once")
    ),
    Mistake(
        "no judge",
        MINE,
        ("0 decide", "AccuracyReward` once"),
        config(model={"rewards": {"f": "observe_r1.rewards.FormatReward"}}),
    ),
    Mistake("questions for test", (), ("`test` needs data.held_out",), command="test"),
    Mistake("questions for predict", (), ("`predict` needs data.held_out",), command="predict"),
    Mistake("nothing to train", ("--model.policy.freeze=['*']",), ("policy.freeze", "no parameter", "policy.lora")),
    Mistake("freeze", ("--model.policy.freeze=['*vision*']",), ("'*vision*'", "model.visual.blocks.*")),
    Mistake("learning rate", ("--model.learning_rates={{'*vison*': 1e-5}}",), ("'*vison*'", "model.visual.blocks.*")),
    Mistake(
        "adapters",
        ("--model.policy.lora={{rank: 4, target_modules: [q_proj, qproj]}}",),
        ("target_modules", "called qproj", "q_proj", "[all-linear]"),
    ),
    Mistake("rank of adapters", ("--model.policy.lora={{rank: 0}}",), ("policy.lora.rank is 0", "1 or more")),
    Mistake("attention", ("--model.policy.attn_implementation=flash",), ("flash", "sdpa")),
    Mistake("attention of prefixes", ("--model.policy.prefix_attention=flash_attn",), ("CUDA", "Choose one of auto")),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_is_named(mistake: Mistake, told: Callable[[Mistake], None]) -> None:
    told(mistake)
