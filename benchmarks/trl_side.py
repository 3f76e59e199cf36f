"""How TRL's GRPOTrainer runs the workload of `vs_trl.py`, and the check that both sides compute the same.

On a CPU, TRL projects every position of a row through the language-model head. On CUDA, where it has Triton kernels, it
projects only positions with a label, which are those of the completions (`compact` in
`trl.trainer.utils.add_fused_lm_head`). The case `trl_completion_only` answers the question that decides it,
`_use_triton` as `trl.trainer.utils` sees it, with yes. The kernels ask their own
`trl.kernels.chunked_logprob._use_triton`, so they still run in torch. Nothing else is changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl
import trl.trainer.utils
from our_side import (
    CLIP_NORM,
    FIRST_UNUSED_TOKEN,
    KL_COEFFICIENT,
    LEARNING_RATE,
    QUESTIONS,
    VOCABULARY,
    Meter,
    PassCounter,
    Workload,
    encoded_prompts,
    policy_options,
)
from torch import Tensor

from observe_r1.experience import EncodedPrompt, GroupSlice
from observe_r1.loading import load_policy

LOGPROB_LIMIT = 1e-4  # largest difference of a log-prob in float32
GRADIENT_LIMIT = 1e-5  # largest difference of a gradient, as a share of the largest gradient


class TimedTrainer(trl.GRPOTrainer):  # type: ignore[misc]
    """TRL's trainer, unchanged but for clocks around the parts of a step."""

    meter: Meter

    def _generate_single_turn(self, *arguments: Any, **named: Any) -> Any:
        with self.meter.clock.measure("generate"):
            completions, logprobs = super()._generate_single_turn(*arguments, **named)
        lengths = {len(tokens) for tokens in completions}
        assert lengths == {self.meter.workload.new_tokens}, lengths
        return completions, logprobs

    def _get_per_token_logps_and_entropies(self, *arguments: Any, **named: Any) -> Any:
        if torch.is_grad_enabled():
            return super()._get_per_token_logps_and_entropies(*arguments, **named)
        with self.meter.clock.measure("reference"):
            return super()._get_per_token_logps_and_entropies(*arguments, **named)

    def _generate_and_score_completions(self, *arguments: Any, **named: Any) -> Any:
        result = super()._generate_and_score_completions(*arguments, **named)
        self.meter.clock.start_training()
        return result


class EndOfStep(transformers.TrainerCallback):  # type: ignore[misc]
    """Tells the meter when steps end."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_train_begin(self, *_: Any, **named: Any) -> None:
        self.meter.clock.start_run()

    def on_step_end(self, *_: Any, **named: Any) -> None:
        self.meter.end_step()


class CountedHead:
    """TRL's fused head, with its rows counted; the head as a module is only called by `generate`."""

    function = trl.trainer.utils._ChunkedLogProbFunction

    def __init__(self, counter: PassCounter, reference_head: Tensor) -> None:
        self.counter, self.reference_head = counter, reference_head

    def apply(self, hidden: Tensor, weight: Tensor, *arguments: Any) -> Any:
        self.counter.add(weight is self.reference_head, "head_positions", len(hidden))
        return self.function.apply(hidden, weight, *arguments)


def score_completions_only() -> None:
    """Makes TRL choose on a CPU the positions that it chooses on CUDA."""
    trl.trainer.utils._use_triton = lambda device: True


def rewards(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
    """Every other completion is right."""
    return [float(number % 2 == 0) for number in range(len(completions))]


def make_trainer(workload: Workload, directory: Path) -> TimedTrainer:
    """The trainer with everything that only costs time turned off: checkpointing, logs, saves, progress bars."""
    prompts = workload.prompts_of_run

    def rows(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        # pictures stay decoded: a column of images would decode each of them once for every completion
        texts = [prompts[number].messages[0]["content"][1]["text"] for number in batch["number"]]
        return {
            "prompt": [[{"role": "user", "content": text}] for text in texts],
            "images": [list(prompts[number].images) for number in batch["number"]],
        }

    dataset = datasets.Dataset.from_dict({"number": list(range(len(prompts)))}).with_transform(rows)
    arguments = trl.GRPOConfig(
        output_dir=str(directory / "trl"),
        use_cpu=True,
        bf16=False,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
        gradient_checkpointing=False,
        per_device_train_batch_size=len(QUESTIONS) * workload.group_size // workload.trl_micro_batches,
        gradient_accumulation_steps=workload.trl_micro_batches,
        steps_per_generation=workload.trl_micro_batches,  # all completions are generated at once
        num_generations=workload.group_size,
        max_completion_length=workload.new_tokens,
        max_steps=workload.warm_up + workload.steps,
        beta=KL_COEFFICIENT,
        loss_type="dapo",
        scale_rewards="group",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        optim="adamw_torch_fused",
        max_grad_norm=CLIP_NORM,
        shuffle_dataset=False,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return TimedTrainer(str(directory), rewards, arguments, dataset)


def run_trl(case: str, workload: Workload, directory: Path) -> dict[str, Any]:
    """Trains with TRL."""
    if case == "trl_completion_only":
        score_completions_only()
    trainer, meter = make_trainer(workload, directory), Meter(workload, directory)
    trainer.meter = meter
    trainer.add_callback(EndOfStep(meter))
    meter.counter.watch(trainer.model, is_reference=False)
    meter.counter.watch(trainer.ref_model, is_reference=True)
    trl.trainer.utils._ChunkedLogProbFunction = CountedHead(meter.counter, trainer.ref_model.lm_head.weight)
    trainer.train()
    return meter.report(case)


# ---- the same tokens on both sides -----------------------------------------------------------------------------------


def check(workload: Workload, directory: Path) -> dict[str, Any]:
    """Differences between observe_r1 and both cases of TRL on the same weights, prompts and completions.

    Log-probs are compared one by one, and the gradient of their mean, weighted by an advantage for each completion.
    """
    generator = torch.Generator().manual_seed(0)
    size = workload.group_size
    encoded = encoded_prompts(workload, directory)
    shape = (len(encoded) * size, workload.new_tokens)
    completions = torch.randint(FIRST_UNUSED_TOKEN, VOCABULARY, shape, generator=generator)
    advantages = torch.randn(shape[0], generator=generator)

    policy = load_policy(policy_options(directory))
    slices = [GroupSlice(p, list(completions[n * size : (n + 1) * size])) for n, p in enumerate(encoded)]
    ours = policy(slices, 1.0).logprobs.view(shape)
    (ours * advantages[:, None]).mean().backward()
    gradients = {name: parameter.grad for name, parameter in policy.model.named_parameters()}
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())

    trainer = make_trainer(workload, directory)
    inputs = trl_inputs(trainer, encoded, completions, size)
    found: dict[str, Any] = {"case": "check", "largest_gradient": largest, "passed": True}
    for case in ("trl", "trl_completion_only"):
        if case == "trl_completion_only":
            score_completions_only()
        trainer.model.zero_grad()
        theirs, _, _ = trl.GRPOTrainer._get_per_token_logps_and_entropies(trainer, trainer.model, **inputs)
        (theirs * advantages[:, None]).mean().backward()
        logprob = float((theirs - ours).detach().abs().max())
        differences = {
            name: float((parameter.grad - gradients[name]).abs().max()) / largest
            for name, parameter in trainer.model.named_parameters()
        }
        worst = max(differences, key=differences.__getitem__)
        found[case] = {"logprob": logprob, "gradient": differences[worst], "worst_parameter": worst}
        found["passed"] &= logprob <= LOGPROB_LIMIT and differences[worst] <= GRADIENT_LIMIT
    return found


def trl_inputs(
    trainer: TimedTrainer, encoded: Sequence[EncodedPrompt], completions: Tensor, size: int
) -> dict[str, Any]:
    """What TRL's own preparation makes of the prompts, and the completions behind it.

    Raises:
        ValueError: TRL reads other prompts than observe_r1.
    """
    conversations, images = [], []
    for prompt in (item.prompt for item in encoded):
        text = prompt.messages[0]["content"][1]["text"]
        conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        conversations += [conversation] * size
        images += [list(prompt.images)] * size
    texts = [
        trl.data_utils.apply_chat_template({"prompt": conversation}, trainer.processing_class)["prompt"]
        for conversation in conversations
    ]
    prepared = trainer.processing_class(images=images, text=texts, padding=True, return_tensors="pt")
    for row, item in enumerate(item for item in encoded for _ in range(size)):
        ids = prepared["input_ids"][row][prepared["attention_mask"][row].bool()]
        if not torch.equal(ids, item.token_ids):
            raise ValueError(f"TRL encodes prompt {item.prompt.id!r} to other tokens than observe_r1.")
    vision = [item.vision for item in encoded if item.vision is not None]
    pixels = torch.cat([item.pixel_values.repeat(size, 1) for item in vision])
    if not torch.equal(prepared["pixel_values"], pixels):
        raise ValueError("TRL's image processor makes other pixels than observe_r1's.")
    ones = torch.ones_like(completions)
    return {
        "input_ids": torch.cat([prepared["input_ids"], completions], dim=1),
        "attention_mask": torch.cat([prepared["attention_mask"], ones], dim=1),
        "mm_token_type_ids": torch.cat([prepared["mm_token_type_ids"], 0 * ones], dim=1),
        "pixel_values": prepared["pixel_values"],
        "image_grid_thw": prepared["image_grid_thw"],
        "num_images": [len(pictures) for pictures in images],
        "logits_to_keep": completions.shape[1],
    }
