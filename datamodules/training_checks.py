"""What has to fit together before a ladder is trained on."""

from __future__ import annotations

from observe_r1.module import ObserveR1


def check_training(module: ObserveR1, prompts_per_rollout: int, ranks: int, micro_batches: int) -> None:
    """Compares the sizes of rollouts, optimizer steps and the model.

    Args:
        prompts_per_rollout: Over all ranks.
        ranks: Among which they are shared.
        micro_batches: Of an optimizer step, on one rank.

    Raises:
        ValueError: Ranks cannot share a rollout, nothing could be learned from a group, micro-batches would be empty,
            or completions may be longer than the model can read.
    """
    if prompts_per_rollout % ranks:
        raise ValueError(
            f"data.prompts_per_rollout is {prompts_per_rollout}, which {ranks} ranks cannot share evenly: use a "
            f"multiple of {ranks}."
        )
    size, steps = module.sampling.group_size, module.updates.steps_per_rollout
    if size == 1:
        raise ValueError(
            "model.sampling.group_size is 1: advantages compare the completions of a prompt, so nothing would be "
            "learned. Use 2 or more (paper: 8)."
        )
    completions = prompts_per_rollout // ranks * size
    if steps * micro_batches > completions:
        raise ValueError(
            f"A rollout has {completions} completions on a rank ({prompts_per_rollout // ranks} prompts × "
            f"{size}), fewer than the {steps * micro_batches} micro-batches to deal them to: make "
            f"trainer.accumulate_grad_batches ({micro_batches}) or model.updates.steps_per_rollout ({steps}) smaller, "
            "or data.prompts_per_rollout larger."
        )
    positions = getattr(module.policy.model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and module.sampling.max_new_tokens >= positions:
        raise ValueError(
            f"model.sampling.max_new_tokens is {module.sampling.max_new_tokens}, and the model has {positions} "
            "positions for a prompt with its completion: use less."
        )
