"""Checkpoints that are none, or of another run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from mistake import Mistake, changed_checkpoint, cut, file

RESUME = ("--trainer.max_steps=2", "--ckpt_path={checkpoint}")

MISTAKES = [
    Mistake("none", ("--ckpt_path=x.ckpt",), ("no file 'x.ckpt'", "RUN_DIRECTORY/checkpoints")),
    Mistake("text", ("--ckpt_path=x.ckpt",), ("'x.ckpt' is not a checkpoint",), file("x.ckpt", "text")),
    Mistake(
        "cut",
        ("--ckpt_path=changed.ckpt",),
        ("'changed.ckpt' is not a checkpoint",),
        lambda world: (changed_checkpoint(lambda _: None)(world), cut(world.directory / "changed.ckpt")),
    ),
    Mistake(
        "of others",
        ("--ckpt_path=changed.ckpt",),
        ("not written by observe_r1",),
        changed_checkpoint(lambda c: c.pop("observe_r1")),
    ),
    Mistake("directory", ("--ckpt_path={checkpoint.parent}",), ("is a directory", "last.ckpt: name one")),
    Mistake(
        "older version",
        ("--ckpt_path=changed.ckpt",),
        ("another version", "lacks seconds", "observe-r1 export"),
        changed_checkpoint(lambda c: c["observe_r1"].pop("seconds")),
    ),
    Mistake(
        "other model",
        (*RESUME, "--model.policy.lora={{rank: 4}}"),
        ("lora_rank: None in the checkpoint, 4", "model.policy"),
    ),
    Mistake("other ladder", (*RESUME, "--data.ladder={other_ladder}"), ("was 24 and is 12", "Resume with the ladder")),
    Mistake("other order", (*RESUME, "--data.order=random"), ("data.order was ladder and is random", "Resume with")),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_is_named(mistake: Mistake, told: Callable[[Mistake], None]) -> None:
    told(mistake)
