"""A rollout as plain containers and tensors, for checkpoints that load without unpickling code.

Images are not saved: they are read and processed again from the ladder, by position.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

from observe_r1.experience import (
    Completion,
    EncodedPrompt,
    Experience,
    GroupScores,
    OptimizerStep,
    PromptGroup,
    Sampled,
    StartedRollout,
    StepTotals,
)


def to_state(experience: Experience) -> dict[str, Any]:
    """What `from_state` needs to make the same experience again."""
    return {
        "groups": [
            {
                "position": group.prompt.prompt.position,
                "completions": [vars(completion) for completion in group.completions],
                "scores": None if group.scores is None else vars(group.scores),
                "old_logprobs": group.old_logprobs,
                "reference_logprobs": group.reference_logprobs,
            }
            for group in experience.trained_groups
        ],
        "received": len(experience.received),  # the last of the groups
        "steps": [
            {
                "micro_batches": step.micro_batches,
                "totals": asdict(step.totals),
                "fillers": sorted(step.fillers),
            }
            for step in experience.steps
        ],
        "metrics": dict(experience.metrics),
        "verdicts": dict(experience.verdicts),
    }


def from_state(state: dict[str, Any], prompt_at: Callable[[int], EncodedPrompt]) -> Experience:
    """The experience that was saved.

    Args:
        state: What `to_state` gave.
        prompt_at: Reads and encodes the sample at a ladder position.
    """
    groups = [
        PromptGroup(
            prompt_at(group["position"]),
            [Completion(**completion) for completion in group["completions"]],
            None if group["scores"] is None else GroupScores(**group["scores"]),
            group["old_logprobs"],
            group["reference_logprobs"],
        )
        for group in state["groups"]
    ]
    steps = [
        OptimizerStep(
            [[(g, list(completions)) for g, completions in assignment] for assignment in step["micro_batches"]],
            StepTotals(**step["totals"]),
            frozenset(step["fillers"]),
        )
        for step in state["steps"]
    ]
    sampled = len(groups) - state.get("received", 0)
    return Experience(groups[:sampled], steps, state["metrics"], state["verdicts"], groups[sampled:])


def started_to_state(rollout: StartedRollout) -> dict[str, Any]:
    """What `started_from_state` needs to make the same started rollout again. Waits for its completions."""
    sampled = rollout.sampled.result()
    return {
        "positions": [prompt.prompt.position for prompt in rollout.prompts],
        "completions": [[vars(completion) for completion in group] for group in sampled.completions],
        "seconds": sampled.seconds,
        "asked_for": rollout.asked_for,
        "weights_step": rollout.weights_step,
    }


def started_from_state(state: dict[str, Any], prompt_at: Callable[[int], EncodedPrompt]) -> StartedRollout:
    """The rollout that was saved, its completions sampled.

    Args:
        state: What `started_to_state` gave.
        prompt_at: Reads and encodes the sample at a ladder position.
    """
    completions = [[Completion(**completion) for completion in group] for group in state["completions"]]
    sampled: Future[Sampled] = Future()
    sampled.set_result(Sampled(completions, state["seconds"]))
    prompts = [prompt_at(position) for position in state["positions"]]
    # it cannot fail any more, so its prompts need not be drawn again
    return StartedRollout(prompts, sampled, state["asked_for"], state["weights_step"], source_state={})
