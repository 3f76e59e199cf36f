"""Watches the figures of a training and says by name when it is sick, and what helps."""

from __future__ import annotations

import logging
import math
from collections import Counter
from dataclasses import asdict
from typing import Any

import lightning as L
import torch
from rich.text import Text

from observe_r1.callbacks.media.logger_media import log_text
from observe_r1.callbacks.run_directory import run_directory
from observe_r1.callbacks.terminal import say
from observe_r1.experience import Experience
from observe_r1.health.completions import LengthCollapse, LengthExplosion, RewardHacking, Templated
from observe_r1.health.optimisation import EntropyCollapse, GradientSpikes, KLBlowUp, NonFinite
from observe_r1.health.rule import Rule
from observe_r1.health.samples import FAILURES, SamplerMismatch, SkippedSamples, VerificationFailing, ZeroAdvantages
from observe_r1.health.watch import Event, Watch
from observe_r1.module import ObserveR1
from observe_r1.ranks import sum_over_ranks
from observe_r1.strategies import engine_gradient_norm

STEP_FIGURES = tuple(
    f"train/{name}"
    for name in ("loss", "gradient_norm", "kl", "entropy", "sampler_mismatch", "log_ratio", "clip_fraction")
)
NOT_BAD = ("fewer_than_ranks", "other_ranks_have_none")  # samples that are left out, but could be used

logger = logging.getLogger(__name__)


class SickRun(RuntimeError):
    """The run was stopped because it was sick and `model.on_sick` is `stop`."""


class Health(L.Callback):
    """Warns of sick patterns by name, once each, with the figures and advice; and says when they are over.

    Every `observe-r1 fit` has it. What it does then is `model.on_sick`; `--health.RULE=null` leaves out a rule and
    `--health.RULE.OPTION=...` changes it. docs/curves.md shows what the sicknesses look like. Warnings go to the
    terminal, the log of this module, TensorBoard and W&B (text, and `health/RULE`, 1 while it lasts) and
    `summary.json`.

    All figures are of all ranks, so all ranks come to the same conclusion at the same time.

    Args:
        reward_hacking: A part of the reward rises while fewer answers are correct.
        templated_completions: The same completion to different questions.
        length_collapse: Completions become far shorter than they were.
        length_explosion: Many completions are cut by the length limit.
        kl_blow_up: The policy is far from the reference.
        entropy_collapse: The policy is all but certain of every token.
        zero_advantages: Groups are all right or all wrong.
        sampler_mismatch: The sampler is another policy than the one that is trained.
        gradient_spikes: Gradient norms far above the usual.
        non_finite: Loss or gradients are nan or infinite.
        verification_failing: Answers that nobody could judge.
        skipped_samples: Samples that could not be used.
        own: Further rules, by class_path.
    """

    def __init__(
        self,
        reward_hacking: RewardHacking | None = RewardHacking(),
        templated_completions: Templated | None = Templated(),
        length_collapse: LengthCollapse | None = LengthCollapse(),
        length_explosion: LengthExplosion | None = LengthExplosion(),
        kl_blow_up: KLBlowUp | None = KLBlowUp(),
        entropy_collapse: EntropyCollapse | None = EntropyCollapse(),
        zero_advantages: ZeroAdvantages | None = ZeroAdvantages(),
        sampler_mismatch: SamplerMismatch | None = SamplerMismatch(),
        gradient_spikes: GradientSpikes | None = GradientSpikes(),
        non_finite: NonFinite | None = NonFinite(),
        verification_failing: VerificationFailing | None = VerificationFailing(),
        skipped_samples: SkippedSamples | None = SkippedSamples(),
        own: list[Rule] | None = None,
    ) -> None:
        rules = (
            *(reward_hacking, templated_completions, length_collapse, length_explosion, kl_blow_up, entropy_collapse),
            *(zero_advantages, sampler_mismatch, gradient_spikes, non_finite, verification_failing, skipped_samples),
            *(own or ()),
        )
        self.watch = Watch([rule for rule in rules if rule is not None])
        self._last_step = 0
        self._skipped = 0.0  # samples, up to the rollout before
        self._stopping: Event | None = None

    # ---- figures ----------------------------------------------------------------------------------------------------

    def on_rollout_end(self, trainer: L.Trainer, pl_module: ObserveR1, experience: Experience) -> None:
        if pl_module.on_sick == "ignore":
            return
        counted = self._counts(trainer, pl_module, experience)
        if "parity/mean" in experience.metrics:  # of each rank
            parity = torch.tensor([experience.metrics["parity/mean"], 1.0], dtype=torch.float64)
            total, ranks = sum_over_ranks(parity, pl_module.device).tolist()
            counted["parity/mean"] = total / ranks
        experience.metrics["rollout/repeated"] = counted.pop("repeated") / counted.pop("completions")
        self._observe(trainer, pl_module, experience.metrics | counted)
        for trainer_logger in trainer.loggers:
            marks = {f"health/{name}": mark for name, mark in self.watch.marks.items()}
            trainer_logger.log_metrics(marks, step=trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        assert isinstance(pl_module, ObserveR1)
        if pl_module.on_sick == "ignore" or trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        logged = trainer.callback_metrics
        figures = {name: float(logged[name]) for name in STEP_FIGURES if name in logged}
        norm = engine_gradient_norm(trainer.strategy)  # DeepSpeed's is logged after this
        if norm is not None:
            figures["train/gradient_norm"] = float(norm)
        if trainer.precision == "16-mixed" and not math.isfinite(figures.get("train/gradient_norm", 0.0)):
            del figures["train/gradient_norm"]  # how the loss scale is found: such steps are left out
        self._observe(trainer, pl_module, figures)
        if self._stopping is not None:
            self._stop(trainer, self._stopping)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._stopping is not None:  # since the last validation
            self._stop(trainer, self._stopping)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, ObserveR1)
        is_whole = not trainer.sanity_checking or trainer.num_sanity_val_batches == trainer.num_val_batches
        if trainer.state.fn == "fit" and pl_module.on_sick != "ignore" and is_whole:
            figures = {f"val/{name}": float(value) for name, value in pl_module.validation_figures.items()}
            self._observe(trainer, pl_module, figures)

    def _counts(self, trainer: L.Trainer, module: ObserveR1, experience: Experience) -> dict[str, float]:
        """What the figures of the rollout do not say, added up over ranks."""
        texts = Counter(completion.text for group in experience.groups for completion in group.completions)
        verdicts = experience.verdicts
        mine = {
            "repeated": max(texts.values(), default=0),  # the most frequent one of each rank
            "completions": texts.total(),
            "samples/drawn": len(experience.groups),
        }
        added = sum_over_ranks(torch.tensor(list(mine.values()), dtype=torch.float64), module.device).tolist()
        counts = dict(zip(mine, added, strict=True)) | {"verdicts/all": float(sum(verdicts.values()))}
        counts |= {f"verdicts/{name}": float(verdicts.get(name, 0)) for name in FAILURES}
        data: Any = getattr(trainer, "datamodule", None)
        skipped = data.skipped()["train"] if hasattr(data, "skipped") else {}
        total = float(sum(count for reason, count in skipped.items() if reason not in NOT_BAD))
        counts["samples/skipped"], self._skipped = total - self._skipped, total
        counts["samples/drawn"] += counts["samples/skipped"]
        return counts

    # ---- events -----------------------------------------------------------------------------------------------------

    def _observe(self, trainer: L.Trainer, module: ObserveR1, figures: dict[str, float]) -> None:
        for event in self.watch.observe(trainer.global_step, figures):
            if event.begins and event.stops and module.on_sick == "stop":
                self._stopping = self._stopping or event
            if trainer.is_global_zero:
                tell(trainer, event)

    def _stop(self, trainer: L.Trainer, event: Event) -> None:
        """Ends the run after an optimizer step, on all ranks, with a checkpoint of it unless its weights are lost."""
        text = f"{event.headline}: {event.evidence}. The run ends because model.on_sick is stop."
        directory, self._stopping = run_directory(trainer), None  # who goes on from the checkpoint knows of it
        if event.name != NonFinite.name and directory is not None:
            path = directory / "checkpoints" / "sick.ckpt"
            trainer.save_checkpoint(path)
            text += f" To go on from here, with other settings: --ckpt_path {path}. It stops for other sicknesses only."
        elif directory is not None:
            text += " Its weights are lost and were not saved: go on from an earlier checkpoint."
        raise SickRun(text)

    def state_dict(self) -> dict[str, Any]:
        stopping = None if self._stopping is None else asdict(self._stopping)
        watched = {"watch": self.watch.state_dict(), "last_step": self._last_step, "skipped": self._skipped}
        return {**watched, "stopping": stopping}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.watch.load_state_dict(state_dict["watch"])
        self._last_step = state_dict["last_step"]
        self._skipped = state_dict["skipped"]
        self._stopping = None if state_dict["stopping"] is None else Event(**state_dict["stopping"])


def tell(trainer: L.Trainer, event: Event) -> None:
    """On the terminal, in the log and in the loggers that show text."""
    if event.begins:
        headline = Text(f"Sick: {event.headline}: ", style="bold yellow")
        say(headline.append(f"{event.evidence}.", style="not bold"), f"  {event.advice}", "  More: docs/curves.md")
    else:
        say(Text(f"Well again: {event.headline}: {event.evidence}.", style="green"))
    # the terminal has it already; a log that somebody has set up has not
    if logger.hasHandlers():
        level = logging.WARNING if event.begins else logging.INFO
        logger.log(level, "%s: %s. %s", event.headline, event.evidence, event.advice if event.begins else "")
    text = f"**{event.headline}** {event.evidence}. " + (event.advice if event.begins else "")
    log_text(trainer.loggers, f"health/{event.name}", text, trainer.global_step)
