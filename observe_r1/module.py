"""The LightningModule: policy, reference and the GRPO step of Observe-R1 (arXiv 2505.12432).

The way of a step:
  1. the loader of the data module asks `collect` for a rollout of the next prompts in curriculum order
  2. `collect` samples G completions each, scores them, and turns scores into weighted advantages
  3. it deals them out to optimizer steps and micro-batches and fixes the old and reference log-probs
  4. `training_step` computes the loss of one micro-batch, as its exact share of the optimizer step

Differences from the authors' release, and why, are listed in docs/differences.md.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from observe_r1.advantages import AdvantageOptions
from observe_r1.checkpoint import ENTRY, check_entry, drop_frozen, restore_frozen
from observe_r1.collection import FilteringOptions, PromptSource, RolloutCollector, UpdateOptions, rollout_seed
from observe_r1.encoding import PromptEncoder, PromptOptions
from observe_r1.experience import EncodedPrompt, Experience, MicroBatch, PromptGroup, Sealed, StartedRollout
from observe_r1.loading import PolicyOptions, load_processor
from observe_r1.loss import micro_batch_loss
from observe_r1.metrics import PassRate, step_sums
from observe_r1.objective import ImportanceOptions, KLOptions, ObjectiveOptions
from observe_r1.parameter_groups import parameter_groups
from observe_r1.phase_clock import PhaseClock
from observe_r1.policy import Policy
from observe_r1.ranks import over_ranks
from observe_r1.rewards import AccuracyReward, FormatReward, Reward, RewardCombination
from observe_r1.rollout import HFRollout, RolloutEngine, SamplingOptions
from observe_r1.sharding import gradient_norm
from observe_r1.strategies import engine_gradient_norm, load_models, prepare

SchedulerCallable = Callable[[Optimizer, int], LRScheduler]


class ObserveR1(L.LightningModule):
    """Trains a vision-language policy with group-relative policy optimisation and the Observe-R1 weighting.

    Args:
        policy: The model and which of its weights are trained.
        prompt: How samples become prompts.
        sampling: How completions are sampled.
        rewards: The parts of the reward by name; exactly one decides what is correct. Default: format and accuracy.
        rollout: The engine that samples. Default: the model itself.
        advantage: Bonus, normalisation and dynamic weight.
        objective: The loss.
        kl: The pull to the reference model.
        importance: Correction for a sampler that is not the trainer.
        updates: Optimizer steps and epochs per rollout.
        filtering: What is left out of training.
        optimizer: Optimizer of the trainable parameters.
        learning_rates: Learning rates of parts of the model, by shell patterns of parameter names such as `*visual*`;
            the first pattern that fits a parameter decides. All others have the optimizer's.
        scheduler: Learning-rate schedule, given the optimizer and the optimizer steps of the run.
        validation_max_new_tokens: Length limit of the greedy answers to held-out questions; null: as in training.
        prediction: What `predict` gives: one `greedy` answer to each question, or a group `sampled` as in training.
        on_sick: What the callback Health does when the training is sick: `warn`, `stop` with an error and a checkpoint
            where it would not heal, or `ignore`.
        seed: Seed of the sampling. The command line sets it from `seed_everything`.
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
        learning_rates: dict[str, float] | None = None,
        scheduler: SchedulerCallable | None = None,
        validation_max_new_tokens: int | None = None,
        prediction: Literal["greedy", "sampled"] = "greedy",
        on_sick: Literal["warn", "stop", "ignore"] = "warn",
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
        self.learning_rates = learning_rates or {}
        self.scheduler = scheduler
        self.greedy = SamplingOptions(1, 0.0, 1.0, validation_max_new_tokens or self.sampling.max_new_tokens)
        self.prediction = prediction
        self.on_sick = on_sick
        self.seed = seed
        self.clock = PhaseClock()
        self.pass_rate = PassRate()
        self.policy: Policy
        self._reference: list[Policy] = []  # no submodule: nothing of it is trained or saved
        self.encoder: PromptEncoder
        self.rollout_figures: dict[str, float] = {}
        self.validation_figures: dict[str, Tensor] = {}
        self.verdicts: dict[str, Counter[str]] = {"train": Counter(), "held_out": Counter()}
        self._held_out_verdicts: Counter[str] = Counter()  # since the last validation, on this rank
        self._train_started = 0.0
        self._restored_rng: Tensor | None = None
        self._step_sums: dict[str, Tensor] = {}
        if self.objective.name == "dr_grpo" and self.advantage.scale == "std":
            raise ValueError("objective.name is dr_grpo, which divides by no deviation: set advantage.scale to none.")
        if self.engine.async_steps and self.importance.correction == "never":
            raise ValueError(
                "rollout.async_steps is 1, so completions come from older weights, and importance.correction is never: "
                "set it to auto, or rollout.async_steps to 0."
            )
        if self.engine.async_steps and self.filtering.zero_variance == "refill":
            raise ValueError(
                "rollout.async_steps is 1 and filtering.zero_variance is refill: a rollout is refilled when its "
                "weights are gone. Set filtering.zero_variance to keep, or rollout.async_steps to 0."
            )

    # ---- models -----------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        prepare(self.trainer.strategy)

    def configure_model(self) -> None:
        if hasattr(self, "policy"):
            return
        processor = load_processor(self.policy_options.pretrained, self.prompt_options)
        self.encoder = PromptEncoder(processor, self.prompt_options)
        has_reference = self.kl.coefficient > 0 and self.policy_options.lora is None  # or the base without adapters
        self.policy, reference = load_models(
            self.trainer.strategy,
            self.policy_options,
            str(self.trainer.precision),
            self.kl.reference_offload if has_reference else None,
        )
        self._reference = [] if reference is None else [reference]

    @property
    def reference(self) -> Policy | None:
        """The frozen model of the KL term; None when there is none, or when it is the policy without adapters."""
        return self._reference[0] if self._reference else None

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(parameter_groups(self.policy.model, self.learning_rates))
        if self.scheduler is None:
            return optimizer
        schedule = self.scheduler(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # ---- rollout ----------------------------------------------------------------------------------------------------

    def collect(self, source: PromptSource, count: int, ahead: deque[StartedRollout]) -> Experience | None:
        """A rollout over the next `count` samples, ready to be trained on; None when the ladder has no more.

        Called by the loader between training steps, on every rank at the same time. Callbacks may have the hooks
        `on_rollout_start(trainer, module)`, called before completions are sampled, and
        `on_rollout_end(trainer, module, experience)`, called before they are trained on.

        Args:
            source: Of the prompts.
            count: Prompts of a rollout, over all ranks.
            ahead: Rollouts that were started before. The next one is taken from its front and, where the engine
                samples ahead, another one is left behind.
        """
        rollout = ahead.popleft() if ahead else self._start_rollout(source, count)
        with self._inference():
            collected = self.collector.finish(rollout, source)
        if not collected.groups:
            return None
        if len(ahead) < self.engine.async_steps and not source.exhausted:
            ahead.append(self._start_rollout(source, count))
        with self._inference():
            experience = self.collector.deal(collected, self.trainer.accumulate_grad_batches)
        experience.metrics["rollout/steps_behind"] = float(self.trainer.global_step - rollout.weights_step)
        self.verdicts["train"].update(experience.verdicts)
        self.rollout_figures = experience.metrics
        self.call_callbacks("on_rollout_end", experience)
        for logger in self.loggers:  # not by `log`, which would repeat what this rollout had and a later one has not
            logger.log_metrics(self.rollout_figures, step=self.trainer.global_step)
        return experience

    def _start_rollout(self, source: PromptSource, count: int) -> StartedRollout:
        self.call_callbacks("on_rollout_start")
        with self._inference():
            return self.collector.start(source, count, self.trainer.global_step)

    def call_callbacks(self, hook: str, *arguments: Any) -> None:
        """Calls `hook(trainer, module, ...)` on every callback that has it."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            method = getattr(callback, hook, None)
            if method is not None:
                method(self.trainer, self, *arguments)

    @cached_property
    def collector(self) -> RolloutCollector:
        """Made at the first rollout, when the models are where the strategy wants them."""
        return RolloutCollector(
            self.policy,
            self.reference,
            self.kl.coefficient > 0,
            self.encoder.processor,
            self.engine,
            self.rewards,
            self.sampling,
            self.advantage,
            self.filtering,
            self.updates,
            self.seed,
            self.clock,
        )

    @contextmanager
    def evaluating(self) -> Iterator[RolloutEngine]:
        """The rollout engine with the weights as they are now, for questions beside the training.

        Callbacks may have the hooks `on_evaluation_start(trainer, module)` and `on_evaluation_end(trainer, module)`.
        """
        self.call_callbacks("on_evaluation_start")
        try:
            with self._inference():
                yield self.collector.engine
        finally:
            self.call_callbacks("on_evaluation_end")

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """The loader runs with gradient and outside of Lightning's autocast."""
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            yield

    # ---- loss -------------------------------------------------------------------------------------------------------

    def training_step(self, sealed: Sealed[MicroBatch], batch_idx: int) -> Tensor:
        batch = sealed.content
        output = self.policy(batch.slices, self.sampling.temperature, with_entropy=True)
        importance = self.importance if self._corrects_importance() else None
        loss, tokens, terms = micro_batch_loss(batch, output.logprobs, self.objective, self.kl, importance)
        self._log_step(step_sums(batch, tokens, terms, loss, output.entropy), batch.last_of_step)
        return loss * self._loss_scale()

    def _loss_scale(self) -> float:
        """Undoes Lightning's division by the micro-batches and the strategy's mean over ranks."""
        micro_batches = self.trainer.accumulate_grad_batches
        # a strategy that accumulates by itself, DeepSpeed, divides by the micro-batches once more
        divisions = 2 if self.trainer.strategy.handles_gradient_accumulation else 1
        return float(micro_batches**divisions * self.trainer.world_size)

    def _corrects_importance(self) -> bool:
        choice = self.importance.correction
        return choice == "always" or (choice == "auto" and not self.engine.is_trainer)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._train_started = time.perf_counter()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if not self.trainer.strategy.handles_gradient_accumulation:
            self.log("train/gradient_norm", gradient_norm(self.policy.parameters()))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        norm = engine_gradient_norm(self.trainer.strategy)
        if norm is not None:
            self.log("train/gradient_norm", norm)
        self.clock.add("train", time.perf_counter() - self._train_started)

    # ---- held-out questions -----------------------------------------------------------------------------------------

    def validation_step(self, sealed: Sealed[list[EncodedPrompt]], batch_idx: int) -> dict[str, Any]:
        answers = self._answer(sealed.content, self.greedy)
        self.pass_rate.add(answers)
        return {"answers": answers}  # for callbacks

    def on_validation_epoch_end(self) -> None:
        figures = self.validation_figures = self.pass_rate.compute()
        self.pass_rate.reset()
        self.verdicts["held_out"].update(sum(over_ranks(self._held_out_verdicts), Counter()))
        self._held_out_verdicts.clear()
        several = self.trainer.world_size > 1  # the metric is reduced already, so the mean over ranks changes nothing
        for name, value in figures.items():
            self.log(f"val/{name}", value, prog_bar=name == "pass_rate", sync_dist=several)

    def test_step(self, sealed: Sealed[list[EncodedPrompt]], batch_idx: int) -> None:
        self.validation_step(sealed, batch_idx)

    def on_test_epoch_end(self) -> None:
        figures = {f"test/{name}": value for name, value in self.pass_rate.compute().items()}
        self.log_dict(figures, sync_dist=self.trainer.world_size > 1)
        self.pass_rate.reset()

    def predict_step(self, sealed: Sealed[list[EncodedPrompt]], batch_idx: int) -> Sealed[list[PromptGroup]]:
        # Lightning keeps predictions until the end, so they go without their pictures
        answers = self._answer(sealed.content, self.greedy if self.prediction == "greedy" else self.sampling)
        for group in answers:
            bare = dataclasses.replace(group.prompt.prompt, images=[])
            group.prompt = dataclasses.replace(group.prompt, prompt=bare, vision=None)
        return Sealed(answers)

    def _answer(self, prompts: list[EncodedPrompt], sampling: SamplingOptions) -> list[PromptGroup]:
        """Judged answers to questions. Samples depend on the first position among them, not on what came before."""
        started = time.perf_counter()
        seed = rollout_seed(self.seed, 0, prompts[0].prompt.position, 0) if prompts else self.seed
        with self._inference():
            groups = self.collector.sample(prompts, sampling, seed, PhaseClock())
        self.clock.add("validate", time.perf_counter() - started)
        self._held_out_verdicts.update(self.rewards.take_counts())
        return groups

    def _log_step(self, sums: dict[str, Tensor], last_of_step: bool) -> None:
        """Adds a micro-batch to the figures of its optimizer step and logs them with its last one."""
        for name, value in sums.items():
            self._step_sums[name] = self._step_sums.get(name, torch.zeros_like(value, dtype=torch.float32)) + value
        if last_of_step:
            self.log_dict(self._step_sums, sync_dist=self.trainer.world_size > 1, reduce_fx="sum")
            self._step_sums = {}
            shown = {name: self.rollout_figures.get(f"rollout/{name}", 0.0) for name in ("reward", "pass_rate")}
            self.log_dict(shown, prog_bar=True, logger=False)
            self.log_dict(self.rollout_figures, logger=False)  # for ModelCheckpoint

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if not self.policy.in_lockstep:  # sharded checkpoints are read back whole
            drop_frozen(checkpoint, self.policy)
        checkpoint[ENTRY] = {
            "fingerprint": self.policy.fingerprint(),
            "rng": over_ranks(torch.get_rng_state()),
            "policy": dataclasses.asdict(self.policy_options),
            "prompt": dataclasses.asdict(self.prompt_options),
            "rollout_figures": dict(self.rollout_figures),
            "seconds": dict(self.clock.total),
            "verdicts": {split: dict(counts) for split, counts in self.verdicts.items()},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = check_entry(checkpoint, self.policy.fingerprint())
        restore_frozen(checkpoint, self.policy)
        self.rollout_figures = dict(saved["rollout_figures"])
        self.clock.total.update(saved["seconds"])
        self.verdicts = {split: Counter(counts) for split, counts in saved["verdicts"].items()}
        states = saved["rng"]
        # on another number of ranks nothing can be the same to the last bit
        self._restored_rng = states[self.global_rank] if len(states) == self.trainer.world_size else None

    def on_train_start(self) -> None:
        if self._restored_rng is not None:
            torch.set_rng_state(self._restored_rng)
            self._restored_rng = None

    def teardown(self, stage: str) -> None:
        self.close()

    def close(self) -> None:
        """Ends what rollouts have started. Lightning calls `teardown` only where nothing went wrong."""
        if "collector" in vars(self):
            self.collector.close()
            del self.collector
