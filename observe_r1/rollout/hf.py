"""Rollouts with Hugging Face `generate` on the model that is being trained. Needs nothing else; the default."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from observe_r1.experience import Completion, EncodedPrompt
from observe_r1.logprobs import sampling_logprobs
from observe_r1.policy import Policy
from observe_r1.rollout.base import RolloutEngine, SamplingOptions


class HFRollout(RolloutEngine):
    """Samples with the policy itself.

    Args:
        sequences_per_batch: Number of completions that are generated at once.
    """

    is_trainer = True

    def __init__(self, sequences_per_batch: int = 128) -> None:
        if sequences_per_batch < 1:
            raise ValueError(f"rollout.sequences_per_batch is {sequences_per_batch}, but it must be at least 1.")
        self.sequences_per_batch = sequences_per_batch
        self._policy: Policy | None = None
        self._tokenizer: Any = None

    def setup(self, policy: Policy, tokenizer: Any) -> None:
        self._policy, self._tokenizer = policy, tokenizer

    def generate(
        self, prompts: Sequence[EncodedPrompt], sampling: SamplingOptions, seed: int
    ) -> list[list[Completion]]:
        policy = self._policy
        if policy is None:
            raise RuntimeError("HFRollout.setup has not been called: the engine has no policy yet.")
        per_batch = max(1, self.sequences_per_batch // sampling.group_size)
        devices = [policy.device] if policy.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices), _evaluating(policy), _plain_generation(policy):
            torch.manual_seed(seed)
            return [
                group
                for start in range(0, len(prompts), per_batch)
                for group in self._generate_batch(policy, prompts[start : start + per_batch], sampling)
            ]

    def _generate_batch(
        self, policy: Policy, prompts: Sequence[EncodedPrompt], sampling: SamplingOptions
    ) -> list[list[Completion]]:
        inputs = {name: value.to(policy.device) for name, value in _pad_left(prompts, policy.pad_token_id).items()}
        width = inputs["input_ids"].shape[1]
        recorder = SamplerDistribution(policy.forbidden(policy.device), sampling.temperature or 1.0, width)
        config = GenerationConfig(
            do_sample=not sampling.greedy,
            max_new_tokens=sampling.max_new_tokens,
            num_return_sequences=sampling.group_size,
            use_cache=True,
            # the recorder divides by the temperature, so that log-probs and samples agree
            **({} if sampling.greedy else {"temperature": 1.0, "top_k": 0, "top_p": sampling.top_p}),
        )
        sequences = policy.model.generate(
            **inputs, generation_config=config, logits_processor=LogitsProcessorList([recorder])
        )
        tokens, logprobs = sequences[:, width:].cpu(), recorder.finish(sequences).cpu()
        end = _end_token_ids(policy.model)
        completions = [
            self._completion(row, row_logprobs, end) for row, row_logprobs in zip(tokens, logprobs, strict=True)
        ]
        size = sampling.group_size
        return [completions[start : start + size] for start in range(0, len(completions), size)]

    def _completion(self, tokens: Tensor, logprobs: Tensor, end: Tensor) -> Completion:
        ends = torch.isin(tokens, end).nonzero()
        length = int(ends[0]) + 1 if len(ends) else len(tokens)
        tokens = tokens[:length].clone()
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return Completion(tokens, logprobs[:length].clone(), text, truncated=not len(ends))


class SamplerDistribution(LogitsProcessor):  # type: ignore[misc]
    """Shapes the distribution that is sampled from, and keeps the log-prob of each token that was.

    A processor sees a token only at the next step, so it holds one step's distribution and looks the token up in it
    then: nothing of size tokens x vocabulary is kept.
    """

    def __init__(self, forbidden: Tensor, temperature: float, prompt_width: int) -> None:
        self._forbidden = forbidden
        self._temperature = temperature
        self._prompt_width = prompt_width
        self._distribution: Tensor | None = None
        self._logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._look_up(input_ids)
        self._distribution = sampling_logprobs(scores, self._forbidden, self._temperature)
        return self._distribution

    def finish(self, sequences: Tensor) -> Tensor:
        """[rows, new tokens] float32 log-probs of everything that was sampled."""
        self._look_up(sequences)
        return torch.stack(self._logprobs, dim=1)

    def _look_up(self, sequences: Tensor) -> None:
        position = self._prompt_width + len(self._logprobs)
        if self._distribution is not None and sequences.shape[1] > position:
            self._logprobs.append(self._distribution.gather(1, sequences[:, position, None])[:, 0])


def _pad_left(prompts: Sequence[EncodedPrompt], pad_token_id: int) -> dict[str, Tensor]:
    width = max(prompt.token_ids.numel() for prompt in prompts)
    shape = (len(prompts), width)
    inputs = {
        "input_ids": torch.full(shape, pad_token_id),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "mm_token_type_ids": torch.zeros(shape, dtype=torch.long),
    }
    for row, prompt in enumerate(prompts):
        length = prompt.token_ids.numel()
        inputs["input_ids"][row, width - length :] = prompt.token_ids
        inputs["attention_mask"][row, width - length :] = 1
        inputs["mm_token_type_ids"][row, width - length :] = prompt.mm_token_type_ids
    vision = [prompt.vision for prompt in prompts if prompt.vision is not None]
    if vision:
        inputs["pixel_values"] = torch.cat([item.pixel_values for item in vision])
        inputs["image_grid_thw"] = torch.cat([item.image_grid_thw for item in vision])
    return inputs


def _end_token_ids(model: Any) -> Tensor:
    end = model.generation_config.eos_token_id
    if end is None:
        end = model.config.get_text_config().eos_token_id
    return torch.tensor([end] if isinstance(end, int) else list(end or []), dtype=torch.long)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


@contextmanager
def _plain_generation(policy: Policy) -> Iterator[None]:
    """Hides the checkpoint's own sampling defaults: Qwen ships a repetition penalty, which `generate` would apply."""
    model = policy.transformer
    shipped = model.generation_config
    model.generation_config = GenerationConfig(
        eos_token_id=_end_token_ids(model).tolist() or None, pad_token_id=policy.pad_token_id
    )
    try:
        yield
    finally:
        model.generation_config = shipped
