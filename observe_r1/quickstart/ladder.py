"""The synthetic ladder of the quick start: scenes, rolled out by the shipped policy, in curriculum order."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from observe_r1.experience import Prompt
from observe_r1.ladder.curriculum import PAPER_MIXING, Mixing, arrange
from observe_r1.ladder.manifest import Manifest
from observe_r1.ladder.shards import appearing_at_once, write_shards
from observe_r1.quickstart.pass_rates import judge
from observe_r1.quickstart.questions import Split, make_question
from observe_r1.quickstart.sampling import PolicySampler, Sampler
from observe_r1.quickstart.tiny_policy import POLICY_DIRECTORY, load_policy

HELD_OUT = "held_out"
SAMPLES_PER_SHARD = 500


def build_quickstart_ladder(
    directory: Path,
    policy_directory: Path = POLICY_DIRECTORY,
    n_train: int = 1_536,
    n_held_out: int = 240,
    n_rollouts: int = 8,
    seed: int = 0,
    *,
    mixing: Mixing | None = PAPER_MIXING,
    sampler: Sampler | None = None,
) -> Manifest:
    """Write a ladder of synthetic questions to `directory`, and its held-out questions to `directory/held_out`.

    Difficulty (1 − pass rate) and complexity (mean tokens of a response) are measured with `n_rollouts` responses of
    the policy to every question. Held-out questions keep the order they are made in, the families taking turns.

    Args:
        directory: Must not exist yet, or be empty. The ladder appears in it all at once.
        policy_directory: Where `from_pretrained` finds the policy that is rolled out.
        n_train: Questions in the ladder.
        n_held_out: Questions held out; their scenes are none of the ladder's.
        n_rollouts: Responses per question.
        seed: Of the scenes, the responses and the order within stages.
        mixing: How the levels are mixed into stages; None keeps them apart.
        sampler: Answers the prompts in place of the policy in `policy_directory`.

    Raises:
        ValueError: A number is less than 1, or the directory holds something.
    """
    for name, value in {"n_train": n_train, "n_held_out": n_held_out, "n_rollouts": n_rollouts}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; the quick-start ladder needs at least 1")
    with appearing_at_once(directory) as unfinished:
        sampler = sampler or PolicySampler(*load_policy(policy_directory), seed=seed)
        train = measure(sampler, _prompts("train", seed, n_train), n_rollouts)
        held_out = measure(sampler, _prompts("held_out", seed, n_held_out), n_rollouts)
        curriculum = arrange(
            [prompt.difficulty or 0.0 for prompt in train],
            [prompt.complexity for prompt in train],
            [prompt.id for prompt in train],
            mixing,
            seed,
        )
        placed = [
            dataclasses.replace(train[index], stage=stage)
            for index, stage in zip(curriculum.order, curriculum.stages, strict=True)
        ]
        built: dict[str, Any] = {
            "by": "observe_r1.quickstart",
            "policy": policy_directory.name,
            "n_rollouts": n_rollouts,
            "seed": seed,
            "mixing": None if mixing is None else dataclasses.asdict(mixing),
        }
        held_out_directory = unfinished / HELD_OUT
        held_out_directory.mkdir()
        write_shards(held_out, held_out_directory, SAMPLES_PER_SHARD, {**built, "mixing": None})
        return write_shards(placed, unfinished, SAMPLES_PER_SHARD, built)


def measure(sampler: Sampler, prompts: list[Prompt], n_rollouts: int) -> list[Prompt]:
    """The prompts with the difficulty and the complexity that `n_rollouts` responses to each of them show."""
    return [
        dataclasses.replace(prompt, **judged.measurement.fields())
        for prompt, judged in zip(prompts, judge(sampler, prompts, n_rollouts), strict=True)
    ]


def _prompts(split: Split, seed: int, number: int) -> list[Prompt]:
    return [make_question(split, seed, index).prompt() for index in range(number)]
