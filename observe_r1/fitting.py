"""What decides whether a training fits into memory: its dearest micro-batch, and what to change where it does not."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from observe_r1.experience import Completion, EncodedPrompt, GroupScores, GroupSlice, MicroBatch, PromptGroup
from observe_r1.micro_batches import assemble_step, deal_steps
from observe_r1.policy import Policy


def made_up_groups(
    policy: Policy, prompt: EncodedPrompt, *, prompts: int, group_size: int, length: int
) -> list[PromptGroup]:
    """`prompts` times this prompt, with completions of `length` random tokens that are all trained on."""
    allowed = torch.ones(policy.model.config.get_text_config().vocab_size)
    allowed[list(policy.forbidden_token_ids)] = 0
    tokens = allowed.multinomial(group_size * length, replacement=True, generator=torch.Generator().manual_seed(0))
    completions = [Completion(ids, torch.zeros(length), "") for ids in tokens.split(length)]
    yes, ones = torch.ones(group_size, dtype=torch.bool), torch.ones(group_size)
    scores = GroupScores({}, ones, correct=yes, judged=yes, trained=yes, advantage=ones, weight=1.0)
    return [PromptGroup(prompt, completions, scores)] * prompts


def dearest(
    policy: Policy,
    prompt: EncodedPrompt,
    *,
    prompts: int,
    group_size: int,
    length: int,
    steps: int,
    micro_batches: int,
) -> MicroBatch:
    """The dearest micro-batch of a rollout of `prompts` times this prompt, dealt out as in training.

    Args:
        prompts: Of one rank.
        length: Of the completions, which are random tokens.
        steps: Optimizer steps of the rollout.
        micro_batches: Of one optimizer step.
    """
    groups = made_up_groups(policy, prompt, prompts=prompts, group_size=group_size, length=length)
    dealt = deal_steps(
        groups,
        steps=steps,
        epochs=1,
        micro_batches=micro_batches,
        skip_zero_advantage=False,
        cost=policy.token_cost(),
    )
    batches = [assemble_step(groups, step, 0) for step in dealt]  # the dearest of each step
    return max(batches, key=lambda batch: len(batch.slices) * prompt.token_ids.numel() + int(batch.lengths.sum()))


def forward_and_backward(
    policy: Policy, batch: MicroBatch, temperature: float, precision: AbstractContextManager[object]
) -> None:
    """As a training step does it. Image features of a frozen tower are made first, as a rollout has them."""
    with precision:
        with torch.no_grad():
            (prompt,) = policy.encode_images([batch.slices[0].prompt])
        batch.slices = [GroupSlice(prompt, part.completions) for part in batch.slices]
        output = policy(batch.to(policy.device).slices, temperature, with_entropy=True)
    output.logprobs.sum().backward()


def advice(micro_batches: int, gradient_checkpointing: bool | str, max_new_tokens: int) -> str:
    """What takes less memory, the cheapest remedy first. Arguments are what the settings are now."""
    return (
        "What helps, in this order: smaller micro-batches by a larger trainer.accumulate_grad_batches (now "
        f"{micro_batches}); model.policy.gradient_checkpointing: true (now {str(gradient_checkpointing).lower()}); a "
        f"smaller model.sampling.max_new_tokens (now {max_new_tokens}); a smaller model.prompt.max_pixels; a frozen "
        "vision tower (model.policy.freeze: ['*visual*']) or model.policy.lora."
    )
