"""What a rollout engine is: the one place where completions come from."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from observe_r1.experience import Completion, EncodedPrompt, Sampled

if TYPE_CHECKING:
    from observe_r1.policy import Policy


@dataclass(frozen=True)
class SamplingOptions:
    """How completions are sampled while training.

    Args:
        group_size: G, completions per prompt.
        temperature: Divides the logits, of the sampler and of the trainer's log-probs alike.
        top_p: Nucleus of the sampler; 1 keeps the sampled distribution equal to the trained one.
        max_new_tokens: Longest completion; what reaches it is marked as truncated.
    """

    group_size: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 8192

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise ValueError(f"sampling.group_size is {self.group_size}, but a group needs at least 1 completion.")
        if self.temperature < 0:
            raise ValueError(f"sampling.temperature is {self.temperature}: use 0 for greedy or a positive value.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p is {self.top_p}, but it must lie in (0, 1].")
        if self.max_new_tokens < 1:
            raise ValueError(f"sampling.max_new_tokens is {self.max_new_tokens}, but it must be at least 1.")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


class RolloutEngine(ABC):
    """Samples completions from the policy, wherever the weights live.

    Log-probs that an engine returns belong to the distribution the trainer uses: logits divided by the temperature, the
    policy's vision tokens forbidden, before any top-p cut.
    """

    is_trainer: bool = False
    """The sampler is the model being trained, so its log-probs need no importance correction and no weight sync."""

    async_steps: int = 0
    """Rollouts that are sampled ahead, while earlier ones are trained on: 0 or 1."""

    def setup(self, policy: Policy, processor: Any) -> None:  # noqa: B027 - engines that need nothing need not say so
        """Called once before the first rollout.

        Args:
            policy: On its device, with the weights that completions are sampled from until `update_weights`.
            processor: What prompts were encoded with; it decodes completions and knows the pixel limits of images.
        """

    @abstractmethod
    def generate(
        self, prompts: Sequence[EncodedPrompt], sampling: SamplingOptions, seed: int
    ) -> list[list[Completion]]:
        """`sampling.group_size` completions for every prompt, in the order of the prompts.

        Equal arguments and weights give equal completions.
        """

    def take_part(
        self, prompts: Sequence[EncodedPrompt], sampling: SamplingOptions, seed: int
    ) -> list[list[Completion]]:
        """`generate` on one of several ranks, which may have no prompts while the others have some.

        The model itself may have to run on all ranks; an engine with weights of its own is not asked for nothing.
        """
        return self.generate(prompts, sampling, seed) if prompts or self.is_trainer else []

    def begin(self, prompts: Sequence[EncodedPrompt], sampling: SamplingOptions, seed: int) -> Future[Sampled]:
        """`generate`, while the caller goes on if the engine can do that; with the weights it has now."""
        sampled: Future[Sampled] = Future()
        sampled.set_result(self.timed_generate(prompts, sampling, seed))
        return sampled

    def timed_generate(self, prompts: Sequence[EncodedPrompt], sampling: SamplingOptions, seed: int) -> Sampled:
        started = time.perf_counter()
        return Sampled(self.generate(prompts, sampling, seed), time.perf_counter() - started)

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:  # noqa: B027
        """Takes the policy's weights under their Hugging Face names; `version` counts optimizer steps."""

    def sleep(self) -> None:  # noqa: B027
        """Frees what it can of the device's memory until `wake`."""

    def wake(self) -> None:  # noqa: B027
        """Takes back what `sleep` freed."""

    def close(self) -> None:  # noqa: B027
        """Ends processes and connections."""
