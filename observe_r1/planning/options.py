"""What a user may tell the planner."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Assumptions:
    """Numbers that nothing in a configuration says. All times rest on them.

    Args:
        training_utilisation: Share of the device's peak arithmetic that forward and backward reach.
        forward_utilisation: The same of forwards without gradient, the reading of prompts among them.
        bandwidth_utilisation: Share of the memory's bandwidth that decoding reaches.
        seconds_per_layer_and_step: That a decode step of the hf rollout waits for kernels to be started.
        seconds_per_step_vllm: The same of vLLM for a whole step, with CUDA graphs.
        sequences_per_engine: Most sequences that vLLM decodes at once.
        reserved_gib: Outside of tensors on a GPU: CUDA's context, libraries, NCCL.
        fragmentation: What torch's allocator takes beyond the tensors that come and go, as a share of them.
    """

    training_utilisation: float = 0.4
    forward_utilisation: float = 0.45
    bandwidth_utilisation: float = 0.6
    seconds_per_layer_and_step: float = 0.0008
    seconds_per_step_vllm: float = 0.004
    sequences_per_engine: int = 256
    reserved_gib: float = 1.5
    fragmentation: float = 0.1

    def __post_init__(self) -> None:
        for name in ("training_utilisation", "forward_utilisation", "bandwidth_utilisation"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise ValueError(f"plan.assumptions.{name} is {value}, but it is a share: use (0, 1].")
        if min(self.reserved_gib, self.fragmentation, self.seconds_per_layer_and_step) < 0:
            raise ValueError("plan.assumptions: reserved_gib, fragmentation and seconds must not be negative.")


@dataclass(frozen=True)
class PlanOptions:
    """The machine and the data that a plan is made for; what is null is taken from the configuration.

    Args:
        device: `h100`, `a100-80gb`, …, or `cpu`; null: this machine's where the trainer's accelerator is there, else
            h100.
        device_memory_gb: As on its label, where it differs from that of the device of this name.
        devices: On each node.
        nodes: Of the training.
        images: In a prompt.
        image_pixels: Of an image; null: the most that prompt.max_pixels or the processor lets through.
        text_tokens: Of a prompt, without its images.
        completion_tokens: Longest completion; null: sampling.max_new_tokens.
        mean_completion_tokens: For the times; null: 512, or the longest where that is shorter.
        json: File to write the plan to.
        assumptions: Numbers that the configuration does not say.
    """

    device: str | None = None
    device_memory_gb: float | None = None
    devices: int | None = None
    nodes: int | None = None
    images: int = 1
    image_pixels: int | None = None
    text_tokens: int = 512
    completion_tokens: int | None = None
    mean_completion_tokens: int | None = None
    json: str | None = None
    assumptions: Assumptions = field(default_factory=Assumptions)

    def __post_init__(self) -> None:
        for name in ("devices", "nodes", "image_pixels", "completion_tokens", "mean_completion_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"plan.{name} is {value}, but it must be at least 1.")
        if self.images < 0 or self.text_tokens < 1:
            raise ValueError(
                f"plan.images is {self.images} and plan.text_tokens {self.text_tokens}: use 0 and 1 or more."
            )
