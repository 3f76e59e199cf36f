"""Parity gate: does the sampler give the trainer's log-probs for its own tokens?"""

from __future__ import annotations

from dataclasses import dataclass, replace

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from observe_r1.experience import Experience, GroupSlice
from observe_r1.micro_batches import assemble
from observe_r1.module import ObserveR1
from observe_r1.objective import kl_estimate

PROBE_PROMPTS = 2
PROBE_TOKENS = 64  # of a completion that is sampled for the comparison only


@dataclass(frozen=True)
class ParityGate:
    """Limits on the mean distance |log π_sampler − log π_trainer| of a token.

    Args:
        warn_above: A warning; 0.02 is above what bf16 on both sides gives.
        error_above: An error, which ends the training.
    """

    warn_above: float
    error_above: float

    def __post_init__(self) -> None:
        if not 0 <= self.warn_above <= self.error_above:
            raise ValueError(
                f"VLLMWeightSync: warn_above is {self.warn_above} and error_above {self.error_above}: use "
                "0 ≤ warn_above ≤ error_above."
            )

    def check(self, trainer: L.Trainer, module: ObserveR1, experience: Experience) -> dict[str, float]:
        """Figures of the rollout, by logging name, before anything is trained on it.

        They are those of its first micro-batch. Where it was sampled with older weights than the trainer has, a few
        completions of its prompts are sampled anew for them.

        `parity/kl` is the k3 estimate of KL(sampler ‖ trainer) in nats per token.

        Raises:
            RuntimeError: The mean exceeds `error_above`.
        """
        is_current = experience.metrics["rollout/steps_behind"] == 0
        sampler, expected = (self._rollout if is_current else self._probe)(trainer, module, experience)
        distance = (sampler - expected).abs()
        figures = {
            "parity/mean": float(distance.mean()),
            "parity/max": float(distance.max()),
            "parity/kl": float(kl_estimate(sampler, expected, "k3").mean()),
        }
        # the comparison is turned so that nan is an error
        if not figures["parity/mean"] <= self.warn_above:
            text = (
                f"The log-probs of {type(module.engine).__name__} differ from the trainer's on the same tokens: mean "
                f"{figures['parity/mean']:.2g}, largest {figures['parity/max']:.2g}, KL {figures['parity/kl']:.2g} "
                f"(step {trainer.global_step})."
            )
            if not figures["parity/mean"] <= self.error_above:
                raise RuntimeError(
                    f"{text} The error limit is {self.error_above}. Likely causes: vLLM's dtype is coarser than the "
                    "trainer's precision, its engine_arguments quantise or change the image processing, or a weight "
                    "was not taken over. Start it with dtype float32 to tell them apart; if the distance is meant, "
                    "raise VLLMWeightSync's error_above and keep importance.correction on."
                )
            rank_zero_warn(f"{text} The warning limit is {self.warn_above}.")
        return figures

    def _rollout(self, trainer: L.Trainer, module: ObserveR1, experience: Experience) -> tuple[Tensor, Tensor]:
        """Log-probs of the sampler and of the trainer, of the tokens that are trained on first."""
        batch = assemble(experience, 0).to(module.device)
        expected = batch.old_logprobs  # of these weights, where there are several steps to a rollout
        # fillers have no log-probs stored, and where weights are sharded every rank calls the model or none
        if expected is None or batch.is_filler or module.policy.in_lockstep:
            expected = _logprobs(trainer, module, batch.slices)
        return batch.sampler_logprobs, expected

    def _probe(self, trainer: L.Trainer, module: ObserveR1, experience: Experience) -> tuple[Tensor, Tensor]:
        """The same, of tokens sampled now."""
        length = min(PROBE_TOKENS, module.sampling.max_new_tokens)
        sampling = replace(module.sampling, group_size=1, max_new_tokens=length)
        prompts = [group.prompt for group in experience.groups[:PROBE_PROMPTS]]
        groups = module.engine.generate(prompts, sampling, seed=trainer.global_step)
        slices = [
            GroupSlice(prompt, [completion.token_ids for completion in group])
            for prompt, group in zip(prompts, groups, strict=True)
        ]
        sampler = torch.cat([completion.sampler_logprobs for group in groups for completion in group])
        return sampler.to(module.device), _logprobs(trainer, module, slices)


def _logprobs(trainer: L.Trainer, module: ObserveR1, slices: list[GroupSlice]) -> Tensor:
    with torch.no_grad(), trainer.precision_plugin.forward_context():
        here = [part.to(module.device) for part in slices]
        logprobs: Tensor = module.policy(here, module.sampling.temperature).logprobs
        return logprobs
