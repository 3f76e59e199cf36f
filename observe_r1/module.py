"""The LightningModule: policy, reference and the GRPO step of Observe-R1 (arXiv 2505.12432).

The way of a step:
  1. the loader of the data module asks `collect` for a rollout of the next prompts in curriculum order
  2. `collect` samples G completions each, scores them, and turns scores into weighted advantages
  3. it deals them out to optimizer steps and micro-batches and fixes the old and reference log-probs
  4. `training_step` computes the loss of one micro-batch, as its exact share of the optimizer step

Differences from the authors' release, and why, are listed in docs/differences.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from observe_r1.advantages import AdvantageOptions
from observe_r1.collection import (
    FilteringOptions,
    PromptSource,
    has_advantage,
    rollout_seed,
    score_groups,
    store_logprobs,
)
from observe_r1.encoding import PromptEncoder, PromptOptions
from observe_r1.experience import EncodedPrompt, Experience, MicroBatch, PromptGroup, Sealed
from observe_r1.logprobs import TokenLogprobs
from observe_r1.metrics import PassRate, rollout_sums, step_sums
from observe_r1.micro_batches import deal_steps
from observe_r1.objective import (
    OBJECTIVES,
    ImportanceOptions,
    KLOptions,
    ObjectiveOptions,
    TokenBatch,
    importance_weights,
    kl_estimate,
    kl_to_come,
)
from observe_r1.phase_clock import PhaseClock
from observe_r1.policy import Policy, PolicyOptions, load_policy, load_processor, load_reference
from observe_r1.rewards import AccuracyReward, FormatReward, Reward, RewardCombination
from observe_r1.rollout import HFRollout, RolloutEngine, SamplingOptions

DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16}
SchedulerCallable = Callable[[Optimizer, int], LRScheduler]


@dataclass(frozen=True)
class UpdateOptions:
    """How often a rollout is trained on.

    Args:
        steps_per_rollout: Optimizer steps over one rollout; each sees a share of its groups.
        epochs_per_rollout: Passes over a rollout.
    """

    steps_per_rollout: int = 1
    epochs_per_rollout: int = 1

    def __post_init__(self) -> None:
        if self.steps_per_rollout < 1 or self.epochs_per_rollout < 1:
            raise ValueError(
                f"updates.steps_per_rollout is {self.steps_per_rollout} and updates.epochs_per_rollout "
                f"{self.epochs_per_rollout}: both must be at least 1."
            )


class ObserveR1(L.LightningModule):
    """Trains a vision-language policy with group-relative policy optimisation and the Observe-R1 weighting.

    Args:
        policy: The model and which of its weights are trained.
        prompt: How samples become prompts.
        sampling: How completions are sampled.
        rewards: The parts of the reward by name; exactly one decides what is correct. Default: format and accuracy.
        rollout: The engine that samples. Default: the model itself, by Hugging Face `generate`.
        advantage: Bonus, normalisation and dynamic weight.
        objective: The loss.
        kl: The pull to the reference model.
        importance: Correction for a sampler that is not the trainer.
        updates: Optimizer steps and epochs per rollout.
        filtering: What is left out of training.
        optimizer: Optimizer of the trainable parameters.
        scheduler: Learning-rate schedule, given the optimizer and the optimizer steps of the run.
        validation_max_new_tokens: Length limit of the greedy answers to held-out questions; null: as in training.
        seed: Of the sampling. The command line sets it from `seed_everything`.
    """

    def __init__(
        self,
        policy: PolicyOptions,
        prompt: PromptOptions = PromptOptions(),
        sampling: SamplingOptions = SamplingOptions(),
        rewards: dict[str, Reward] | None = None,
        rollout: RolloutEngine | None = None,
        advantage: AdvantageOptions = AdvantageOptions(),
        objective: ObjectiveOptions = ObjectiveOptions(),
        kl: KLOptions = KLOptions(),
        importance: ImportanceOptions = ImportanceOptions(),
        updates: UpdateOptions = UpdateOptions(),
        filtering: FilteringOptions = FilteringOptions(),
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: SchedulerCallable | None = None,
        validation_max_new_tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.policy_options = policy
        self.prompt_options = prompt
        self.sampling = sampling
        self.rewards = RewardCombination.named(
            {"format": FormatReward(0.5), "accuracy": AccuracyReward()} if rewards is None else rewards
        )
        self.engine = rollout or HFRollout()
        self.advantage = advantage
        self.objective = objective
        self.kl = kl
        self.importance = importance
        self.updates = updates
        self.filtering = filtering
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.greedy = SamplingOptions(1, 0.0, 1.0, validation_max_new_tokens or self.sampling.max_new_tokens)
        self.seed = seed
        self.clock = PhaseClock()
        self.pass_rate = PassRate()
        self.policy: Policy
        self.reference: Policy | None = None
        self.encoder: PromptEncoder
        self.rollout_figures: dict[str, float] = {}
        self.validation_figures: dict[str, Tensor] = {}
        self._engine_is_ready = False
        self._train_started = 0.0
        self._tokens_trained = 0.0
        self._restored_rng: Tensor | None = None
        self._step_sums: dict[str, Tensor] = {}
        if self.objective.name == "dr_grpo" and self.advantage.scale == "std":
            raise ValueError("objective.name is dr_grpo, which divides by no deviation: set advantage.scale to none.")

    # ---- models -----------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        if hasattr(self, "policy"):
            return
        dtype = DTYPES.get(str(self.trainer.precision), torch.float32)
        processor = load_processor(self.policy_options.pretrained, self.prompt_options)
        self.encoder = PromptEncoder(processor, self.prompt_options)
        self.policy = load_policy(self.policy_options, dtype)
        if self.kl.coefficient > 0 and not self.policy.has_adapters:
            self.reference = load_reference(self.policy_options, dtype)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer([parameter for parameter in self.policy.parameters() if parameter.requires_grad])
        if self.scheduler is None:
            return optimizer
        schedule = self.scheduler(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # ---- rollout ----------------------------------------------------------------------------------------------------

    def collect(self, source: PromptSource, count: int) -> Experience | None:
        """A rollout over the next `count` samples, ready to be trained on; None when the ladder has no more.

        Called by the loader between training steps, on every rank at the same time.
        """
        train_seconds = self.clock.last["train"]
        self.clock.restart()
        self.call_callbacks("on_rollout_start")
        groups, passed_over = self._sample_and_filter(source, count)
        if not groups:
            return None
        adds_kl = self.kl.coefficient > 0
        with torch.no_grad(), self._forward_context():
            steps = deal_steps(
                groups,
                steps=self.updates.steps_per_rollout,
                epochs=self.updates.epochs_per_rollout,
                micro_batches=self.trainer.accumulate_grad_batches,
                skip_zero_advantage=not adds_kl,
                sum_over_ranks=self._sum_over_ranks,
            )
            experience = Experience(groups, steps)
            if len(steps) > 1:
                with self.clock.measure("old_logprobs"):
                    store_logprobs(experience, "old_logprobs", self._policy_logprobs)
            if adds_kl:
                with self.clock.measure("reference_logprobs"):
                    store_logprobs(experience, "reference_logprobs", self._reference_logprobs)
        self._measure(experience, passed_over, train_seconds)
        self.call_callbacks("on_rollout_end", experience)
        return experience

    def _sample_and_filter(self, source: PromptSource, count: int) -> tuple[list[PromptGroup], list[PromptGroup]]:
        """Scored groups to be trained on, and those that were dropped because they have no advantage."""
        refills = self.filtering.max_refills if self.filtering.zero_variance == "refill" else 0
        kept: list[PromptGroup] = []
        dropped: list[PromptGroup] = []
        for _ in range(1 + refills):
            seed = rollout_seed(self.seed, source.epoch, source.position, self.global_rank)
            with self.clock.measure("data"):
                prompts = source.draw(count)
            scored = self.sample(prompts, self.sampling, seed, self.clock)
            if self.filtering.zero_variance == "keep":
                return scored, []
            kept += [group for group in scored if has_advantage(group)]
            dropped += [group for group in scored if not has_advantage(group)]
            drawn, useful = self._sum_over_ranks(
                torch.tensor([len(scored), sum(map(has_advantage, scored))], dtype=torch.float64)
            ).tolist()
            count -= int(useful)
            if count <= 0 or drawn == 0:
                break
        # every rank trains on something: a group without advantage counts nothing and keeps the ranks together
        return (kept, dropped) if kept else (dropped[:1], dropped[1:])

    def sample(
        self, prompts: list[EncodedPrompt], sampling: SamplingOptions, seed: int, clock: PhaseClock
    ) -> list[PromptGroup]:
        """Completions of the prompts, scored."""
        with clock.measure("generate"), self._forward_context():
            completions = self._ready_engine().generate(prompts, sampling, seed) if prompts else []
        groups = [PromptGroup(prompt, group) for prompt, group in zip(prompts, completions, strict=True)]
        with clock.measure("reward"):
            score_groups(groups, self.rewards, self.advantage, self.filtering.overlong)
        return groups

    def _ready_engine(self) -> RolloutEngine:
        if not self._engine_is_ready:
            self.rewards.setup()
            self.engine.setup(self.policy, self.encoder.tokenizer)
            self._engine_is_ready = True
        return self.engine

    @contextmanager
    def _forward_context(self) -> Iterator[None]:
        """The loader runs outside of Lightning's autocast: the rollout asks for it."""
        with self.trainer.precision_plugin.forward_context():
            yield

    def _policy_logprobs(self, batch: MicroBatch) -> Tensor:
        output: TokenLogprobs = self.policy(batch.to(self.device).slices, self.sampling.temperature)
        return output.logprobs

    def _reference_logprobs(self, batch: MicroBatch) -> Tensor:
        if self.reference is not None:
            output: TokenLogprobs = self.reference(batch.to(self.device).slices, self.sampling.temperature)
            return output.logprobs
        with self.policy.adapters_off():
            return self._policy_logprobs(batch)

    # ---- loss -------------------------------------------------------------------------------------------------------

    def training_step(self, sealed: Sealed[MicroBatch], batch_idx: int) -> Tensor:
        batch = sealed.content
        output = self.policy(batch.slices, self.sampling.temperature, with_entropy=True)
        old = output.logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
        sequence = torch.repeat_interleave(torch.arange(len(batch.lengths), device=old.device), batch.lengths)
        advantages = batch.advantages[sequence]
        weight = batch.trained[sequence]
        if self._corrects_importance():
            weight = weight * importance_weights(old, batch.sampler_logprobs, sequence, batch.lengths, self.importance)
        if self.kl.coefficient > 0 and self.kl.placement == "reward":
            assert batch.reference_logprobs is not None
            kl = kl_estimate(old, batch.reference_logprobs, self.kl.estimator)
            advantages = advantages - self.kl.coefficient * kl_to_come(kl, batch.lengths)
        tokens = TokenBatch(output.logprobs, old, advantages, sequence, batch.lengths, weight)
        terms = OBJECTIVES[self.objective.name](tokens, self.objective, batch.totals)
        loss = terms.loss
        if self.kl.coefficient > 0 and self.kl.placement == "loss":
            assert batch.reference_logprobs is not None
            kl = kl_estimate(output.logprobs, batch.reference_logprobs, self.kl.estimator)
            loss = loss + self.kl.coefficient * (kl * terms.token_weight * weight).sum()
        self._log_step(step_sums(batch, tokens, terms, loss, output.entropy), batch.last_of_step)
        # undoes Lightning's division by the micro-batches and the strategy's mean over ranks
        return loss * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def _corrects_importance(self) -> bool:
        choice = self.importance.correction
        return choice == "always" or (choice == "auto" and not self.engine.is_trainer)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._train_started = time.perf_counter()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.clock.add("train", time.perf_counter() - self._train_started)

    # ---- held-out questions -----------------------------------------------------------------------------------------

    def validation_step(self, sealed: Sealed[list[EncodedPrompt]], batch_idx: int) -> None:
        groups = self._answer(sealed.content)
        scores = [group.scores for group in groups if group.scores is not None]
        formats = [score.parts.get("format", score.correct.float()) for score in scores]
        self.pass_rate.update(
            [group.prompt.prompt.difficulty for group in groups],
            torch.cat([score.correct for score in scores]),
            torch.cat(formats) > 0,
            torch.tensor([len(group.completions[0]) for group in groups]),
        )

    def on_validation_epoch_end(self) -> None:
        figures = self.validation_figures = self.pass_rate.compute()
        self.pass_rate.reset()
        # the metric is reduced over ranks already
        self.log_dict({f"val/{name}": value for name, value in figures.items() if "/" not in name}, prog_bar=True)
        self.log_dict({f"val/{name}": value for name, value in figures.items() if "/" in name})

    def test_step(self, sealed: Sealed[list[EncodedPrompt]], batch_idx: int) -> None:
        self.validation_step(sealed, batch_idx)

    def on_test_epoch_end(self) -> None:
        self.log_dict({f"test/{name}": value for name, value in self.pass_rate.compute().items()})
        self.pass_rate.reset()

    def predict_step(self, sealed: Sealed[list[EncodedPrompt]], batch_idx: int) -> Sealed[list[PromptGroup]]:
        return Sealed(self._answer(sealed.content))

    def _answer(self, prompts: list[EncodedPrompt]) -> list[PromptGroup]:
        """One greedy answer to each question."""
        started = time.perf_counter()
        groups = self.sample(prompts, self.greedy, self.seed, PhaseClock())
        self.clock.add("validate", time.perf_counter() - started)
        return groups

    # ---- logging ----------------------------------------------------------------------------------------------------

    def call_callbacks(self, hook: str, *arguments: Any) -> None:
        """Calls `hook(trainer, module, ...)` on every callback that has it."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            method = getattr(callback, hook, None)
            if method is not None:
                method(self.trainer, self, *arguments)

    def _measure(self, experience: Experience, passed_over: list[PromptGroup], train_seconds: float) -> None:
        """Figures of the rollout over all ranks. `training_step` logs them: the loader runs outside of any hook."""
        groups = [*experience.groups, *passed_over]
        sums = rollout_sums(groups)
        sums["rollout/refilled_groups"] = (float(len(passed_over)), 1.0 / self.trainer.world_size)
        sums["speed/generated_tokens"] = (float(sum(len(c) for g in groups for c in g.completions)), 1.0)
        added = self._sum_over_ranks(torch.tensor(list(sums.values()), dtype=torch.float64)).tolist()
        figures = {name: total / count for name, (total, count) in zip(sums, added, strict=True) if count}
        seconds = dict(self.clock.last)
        figures["speed/generated_tokens_per_second"] = figures.pop("speed/generated_tokens") / seconds["generate"]
        trained = sum(step.totals.forwarded_tokens for step in experience.steps) / self.trainer.world_size
        if train_seconds:  # of the rollout before: this one has yet to be trained on
            seconds["train"] = train_seconds
            figures["speed/trained_tokens_per_second"] = self._tokens_trained / train_seconds
        self._tokens_trained = trained
        experience.metrics = self.rollout_figures = figures | {f"seconds/{p}": value for p, value in seconds.items()}

    def _log_step(self, sums: dict[str, Tensor], last_of_step: bool) -> None:
        """Adds a micro-batch to the figures of its optimizer step and logs them with its last one."""
        for name, value in sums.items():
            self._step_sums[name] = self._step_sums.get(name, torch.zeros_like(value, dtype=torch.float32)) + value
        if last_of_step:
            self.log_dict(self._step_sums, sync_dist=self.trainer.world_size > 1, reduce_fx="sum")
            self._step_sums = {}
            shown = {name: self.rollout_figures.get(f"rollout/{name}", 0.0) for name in ("reward", "pass_rate")}
            self.log_dict(shown, prog_bar=True, logger=False)
            self.log_dict(self.rollout_figures)

    def smallest_over_ranks(self, number: int) -> int:
        """Minimum of a number over all ranks."""
        if self.trainer.world_size == 1:
            return number
        reduced = self.trainer.strategy.reduce(torch.tensor(float(number), device=self.device), reduce_op="min")
        return int(reduced)

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        if self.trainer.world_size == 1:
            return values
        reduced = self.trainer.strategy.reduce(values.to(self.device), reduce_op="sum")
        assert isinstance(reduced, Tensor)
        return reduced.cpu()

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # the reference never changes and is loaded from its own files
        for name in [name for name in checkpoint["state_dict"] if name.startswith("reference.")]:
            del checkpoint["state_dict"][name]
        checkpoint["observe_r1"] = {
            "fingerprint": self.policy.fingerprint(),
            "rng": torch.get_rng_state(),
            "rollout_figures": dict(self.rollout_figures),
            "seconds": dict(self.clock.total),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("observe_r1")
        if saved is None:
            raise ValueError("The checkpoint was not written by observe_r1: it has no 'observe_r1' entry.")
        fingerprint = self.policy.fingerprint()
        if saved["fingerprint"] != fingerprint:
            different = {
                key: f"{saved['fingerprint'].get(key)} in the checkpoint, {value} in the model"
                for key, value in fingerprint.items()
                if saved["fingerprint"].get(key) != value
            }
            raise ValueError(
                f"The checkpoint belongs to another model ({different}). Set model.policy to the model it was trained "
                "from, or start without ckpt_path."
            )
        if self.reference is not None:
            reference = self.reference.state_dict()
            checkpoint["state_dict"] |= {f"reference.{name}": value for name, value in reference.items()}
        self.rollout_figures = dict(saved["rollout_figures"])
        self.clock.total.update(saved["seconds"])
        self._restored_rng = saved["rng"]

    def on_train_start(self) -> None:
        if self._restored_rng is not None:
            torch.set_rng_state(self._restored_rng)
            self._restored_rng = None

    def teardown(self, stage: str) -> None:
        self.rewards.close()
        self.engine.close()
