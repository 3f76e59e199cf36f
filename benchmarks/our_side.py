"""The workload of `vs_trl.py`, how it is measured, and how observe_r1 runs it."""

from __future__ import annotations

import observe_r1  # noqa: F401  first: it repairs torchvision beside a CPU-only torch, and lightning imports that

# isort: split
import resource
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from PIL import Image
from random_models import medium_model
from step_clock import StepClock
from torch import Tensor

from observe_r1.advantages import AdvantageOptions
from observe_r1.answers import Gold
from observe_r1.datamodules import NeuraLadderDataModule
from observe_r1.encoding import PromptEncoder, PromptOptions
from observe_r1.experience import EncodedPrompt, Experience, Prompt, PromptGroup
from observe_r1.ladder.shards import write_ladder
from observe_r1.loading import PolicyOptions, load_processor
from observe_r1.logprobs import LogprobHead, TokenLogprobs
from observe_r1.module import ObserveR1
from observe_r1.objective import KLOptions, ObjectiveOptions
from observe_r1.quickstart.tiny_policy import END_OF_TEXT, TURN_END, TURN_START, VISION_TOKENS, build_processor
from observe_r1.rewards.base import CorrectnessReward
from observe_r1.rollout import SamplingOptions

QUESTIONS = (
    "Look at the picture of coloured squares. Count the red squares in the upper half and the blue squares in the "
    "lower half, add both numbers, and subtract the green squares that touch the edge. Explain every step, then give "
    "only the final number.",
    "Look at the picture of coloured squares. Find the brightest square in the upper half and the darkest square in "
    "the lower half, and count the squares on the way from one to the other. Explain every step, then give only the "
    "final number.",
    "Look at the picture of coloured squares. Name the colour that fills most of the squares in the upper half, and "
    "count how many squares of it touch the edge in the lower half. Explain every step, then give the colour and the "
    "final number.",
)
VOCABULARY = 8192
FIRST_UNUSED_TOKEN = 512  # the tokenizer has fewer tokens, special ones included
LEARNING_RATE, KL_COEFFICIENT, CLIP_NORM = 1e-6, 0.04, 1.0
PROMPT_OPTIONS = PromptOptions(system_prompt=None)


@dataclass(frozen=True)
class Workload:
    """What every case does in one step: sample, score with the reference, one optimizer step. float32 on the CPU."""

    group_size: int = 8  # completions of each of the three prompts
    image_side: int = 448  # pixels; 32 × 32 patches, 256 visual tokens
    new_tokens: int = 64  # of every completion: nothing ends early
    warm_up: int = 1  # steps that are not timed
    steps: int = 3  # timed steps
    trl_micro_batches: int = 1  # of TRL's optimizer step; observe_r1 has one

    @property
    def prompts_of_run(self) -> list[Prompt]:
        """Prompts of all steps in order; every image is another one."""
        generator = np.random.default_rng(0)
        prompts = []
        for number in range(len(QUESTIONS) * (self.warm_up + self.steps)):
            squares = Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            image = squares.resize((self.image_side, self.image_side), Image.Resampling.NEAREST)
            content = [{"type": "image", "index": 0}, {"type": "text", "text": QUESTIONS[number % len(QUESTIONS)]}]
            message = {"role": "user", "content": content}
            prompts.append(Prompt(f"prompt-{number}", "vs_trl", [message], [image], Gold("1"), number))
        return prompts

    def save_policy(self, directory: Path) -> None:
        """Writes the random model, 17 million parameters, and its processor as both sides load them."""
        processor = build_processor(QUESTIONS)
        area = self.image_side**2
        limits = type(processor.image_processor.size)(shortest_edge=area, longest_edge=area)
        processor.image_processor.size = limits
        model = medium_model()
        names = (END_OF_TEXT, TURN_START, TURN_END, *VISION_TOKENS)
        special = dict(zip(names, processor.tokenizer.convert_tokens_to_ids(list(names)), strict=True))
        for name in ("vision_start", "vision_end"):
            setattr(model.config, f"{name}_token_id", special[f"<|{name}|>"])
        model.config.image_token_id, model.config.video_token_id = special["<|image_pad|>"], special["<|video_pad|>"]
        text = model.config.get_text_config()
        text.eos_token_id = model.generation_config.eos_token_id = special[TURN_END]
        text.pad_token_id = model.generation_config.pad_token_id = special[END_OF_TEXT]
        with torch.no_grad():
            # special tokens lie against the direction that ordinary ones give the hidden state: nothing ends early, and
            # it makes no difference that only observe_r1 leaves all vision tokens out of the softmax
            embedding = model.get_input_embeddings().weight
            embedding[:, 0] = 1.0
            embedding[list(special.values()), 0] = -3.0
        model.save_pretrained(directory)
        processor.save_pretrained(directory)


class PassCounter:
    """Counts what passes through the parts of policy and reference.

    The names are `part of the step/quantity`; a forward of the policy without gradient belongs to `generate`.

    Args:
        prompt_tokens_per_placeholder: Prompt tokens are counted by their image placeholders, which completions never
            have, because a packed row holds both.
    """

    def __init__(self, prompt_tokens_per_placeholder: float) -> None:
        self.counts: Counter[str] = Counter()
        self._prompt_tokens = prompt_tokens_per_placeholder

    def watch(self, model: Any, is_reference: bool) -> None:
        """Counts from now on what passes through a model."""
        hooks = (
            (model.model.visual, self._see_images),
            (model.model.language_model, self._see_positions),
            (model.get_input_embeddings(), partial(self._see_ids, model.config.image_token_id)),
            (model.get_output_embeddings(), self._see_head),
        )
        for module, hook in hooks:
            module.register_forward_pre_hook(partial(hook, is_reference), with_kwargs=True)

    def add(self, is_reference: bool, quantity: str, number: float) -> None:
        phase = "reference" if is_reference else "train" if torch.is_grad_enabled() else "generate"
        self.counts[f"{phase}/{quantity}"] += number

    def _see_images(self, is_reference: bool, _: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        grids = named["grid_thw"] if "grid_thw" in named else inputs[1]
        self.add(is_reference, "images", len(grids))
        self.add(is_reference, "patches", int(grids.prod(-1).sum()))

    def _see_positions(self, is_reference: bool, _: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.add(is_reference, "text_positions", named["inputs_embeds"].shape[:2].numel())

    def _see_ids(self, image: int, is_reference: bool, _: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        placeholders = int((inputs[0] == image).sum())
        self.add(is_reference, "prompt_tokens", placeholders * self._prompt_tokens)

    def _see_head(self, is_reference: bool, _: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        # while scoring, both sides take the weight past the module: that is counted where their functions are entered
        if not is_reference and not torch.is_grad_enabled():
            self.add(is_reference, "head_positions", inputs[0].shape[:-1].numel())


class Meter:
    """Clock and counter of one run, and what they say about its timed steps."""

    def __init__(self, workload: Workload, directory: Path) -> None:
        self.workload = workload
        self.clock = StepClock()
        prompts = encoded_prompts(workload, directory)
        placeholders = sum(int(prompt.mm_token_type_ids.sum()) for prompt in prompts)
        self.counter = PassCounter(sum(prompt.token_ids.numel() for prompt in prompts) / placeholders)

    def end_step(self) -> None:
        self.clock.end_step()
        if len(self.clock.seconds) == self.workload.warm_up:
            self.counter.counts.clear()

    def report(self, case: str) -> dict[str, Any]:
        """The JSON object of a case; seconds are medians, counts means, over the timed steps."""
        timed = self.clock.seconds[self.workload.warm_up :]
        return {
            "case": case,
            "seconds": {name: statistics.median(step[name] for step in timed) for name in timed[0]},
            "steps": [step["step"] for step in timed],
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "counts": {name: round(n / len(timed), 1) for name, n in sorted(self.counter.counts.items())},
        }


def encoded_prompts(workload: Workload, directory: Path) -> list[EncodedPrompt]:
    """The prompts of the first step, as observe_r1 encodes them."""
    encoder = PromptEncoder(load_processor(str(directory), PROMPT_OPTIONS), PROMPT_OPTIONS)
    encoded = [encoder.encode(prompt) for prompt in workload.prompts_of_run[: len(QUESTIONS)]]
    return [prompt for prompt in encoded if isinstance(prompt, EncodedPrompt)]


def policy_options(directory: Path) -> PolicyOptions:
    """The saved model, without gradient checkpointing."""
    return PolicyOptions(str(directory), gradient_checkpointing=False)


# ---- observe_r1 ------------------------------------------------------------------------------------------------------


class AlternateReward(CorrectnessReward):
    """Every other completion is right: both sides get the same advantages, none of them zero."""

    def judge_groups(self, groups: Sequence[PromptGroup]) -> list[list[bool | None]]:
        return [[number % 2 == 0 for number in range(len(group.completions))] for group in groups]

    def score(self, prompt: Any, completion: Any) -> float:
        raise NotImplementedError("groups are judged at once")


class Measure(L.Callback):
    """Reads the meter of a run of observe_r1."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, ObserveR1)
        assert module.reference is not None
        self.meter.counter.watch(module.policy.model, is_reference=False)
        self.meter.counter.watch(module.reference.model, is_reference=True)
        _count_head(self.meter.counter, module.reference.model.get_output_embeddings())
        self.meter.clock.start_run()

    def on_rollout_end(self, trainer: L.Trainer, module: ObserveR1, experience: Experience) -> None:
        lengths = {len(completion) for group in experience.groups for completion in group.completions}
        assert lengths == {self.meter.workload.new_tokens}, lengths
        self.meter.clock.add("generate", experience.metrics["seconds/generate"])
        self.meter.clock.add("reference", experience.metrics["seconds/reference_logprobs"])
        self.meter.clock.start_training()

    def on_train_batch_end(self, *_: Any) -> None:
        self.meter.end_step()


def _count_head(counter: PassCounter, reference_head: torch.nn.Module) -> None:
    enter = LogprobHead.__call__

    def counted(head: LogprobHead, hidden: Tensor, targets: Tensor) -> TokenLogprobs:
        counter.add(head.module is reference_head, "head_positions", len(targets))
        return enter(head, hidden, targets)

    LogprobHead.__call__ = counted  # type: ignore[method-assign]


def run_ours(workload: Workload, directory: Path) -> dict[str, Any]:
    """Trains with observe_r1, through the public module, data module and Lightning's Trainer."""
    write_ladder(workload.prompts_of_run, directory / "ladder")
    meter = Meter(workload, directory)
    module = ObserveR1(
        policy_options(directory),
        PROMPT_OPTIONS,
        SamplingOptions(workload.group_size, max_new_tokens=workload.new_tokens),
        rewards={"accuracy": AlternateReward()},
        advantage=AdvantageOptions(bonus=0.0, dynamic_weight=None),
        objective=ObjectiveOptions("dapo"),
        kl=KLOptions(KL_COEFFICIENT, placement="loss", estimator="k3"),
        optimizer=partial(torch.optim.AdamW, lr=LEARNING_RATE, weight_decay=0.0, fused=True),
    )
    trainer = L.Trainer(
        accelerator="cpu",
        precision="32-true",
        max_epochs=1,
        gradient_clip_val=CLIP_NORM,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Measure(meter)],
    )
    data = NeuraLadderDataModule(str(directory / "ladder"), prompts_per_rollout=len(QUESTIONS), workers=0)
    trainer.fit(module, datamodule=data)
    return meter.report("ours")
