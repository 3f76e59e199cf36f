"""The data of one rollout, from the question to the tensors the loss reads.

Shapes use P prompt tokens, C completion tokens, N completions, T completion tokens of a micro-batch in total.
All tensors live on the CPU until `MicroBatch.to` moves a micro-batch to the device of the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

import torch
from PIL import Image
from torch import Tensor

from observe_r1.answers import Gold

Message = Mapping[str, Any]
"""A chat message: `role` and `content`, which is text or a list of text items and `{"type": "image", "index": i}`."""


@dataclass(frozen=True)
class Prompt:
    """One question of the ladder, its images and what is known about it."""

    id: str
    source: str
    messages: Sequence[Message]
    images: Sequence[Image.Image]  # RGB; the image items of `messages` point at them by index
    gold: Gold
    position: int = 0  # place in the ladder, the number every order and every resume is expressed in
    difficulty: float | None = None  # 1 - pass rate of the rollouts that measured it
    complexity: float | None = None  # mean completion length of those rollouts, in tokens
    n_correct: int | None = None
    n_rollouts: int | None = None
    stage: float | None = None  # curriculum stage the sample was mixed into


@dataclass(frozen=True)
class Skipped:
    """A sample that could not be used, in place of its prompt: counted by `reason`, never trained on."""

    position: int
    reason: str  # a short name that can be counted, such as "image_corrupt"
    detail: str = ""


@dataclass(frozen=True)
class ImageFeatures:
    """Output of a frozen vision tower for the images of one prompt: it never changes, so it is computed once."""

    images: list[Tensor]  # [tokens, H] each
    deepstack: list[list[Tensor]]  # the same for each early layer that gets features of its own (Qwen3-VL)


@dataclass(frozen=True)
class VisionInputs:
    """What the vision tower reads for one prompt, as the image processor made it."""

    pixel_values: Tensor  # [patches, channels * temporal * patch * patch]
    image_grid_thw: Tensor  # [images, 3] patches in time, height, width
    features: ImageFeatures | None = None  # None: the tower runs in every forward


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the model reads it: placeholders expanded, images processed once whatever the group size."""

    prompt: Prompt
    token_ids: Tensor  # [P] long
    mm_token_type_ids: Tensor  # [P] long, 0 text, 1 image, 2 video
    vision: VisionInputs | None = None

    @property
    def tower_patches(self) -> list[int]:
        """Patches of each image that the vision tower has to see; none where its output is kept."""
        if self.vision is None or self.vision.features is not None:
            return []
        patches: list[int] = self.vision.image_grid_thw.prod(-1).tolist()
        return patches


@dataclass(frozen=True)
class Completion:
    """One answer sampled by the policy."""

    token_ids: Tensor  # [C] long, end-of-turn token included when the model gave one
    sampler_logprobs: Tensor  # [C] float32, under the distribution at the sampling temperature, vision tokens forbidden
    text: str
    truncated: bool = False  # stopped by the length limit instead of an end token

    def __len__(self) -> int:
        return self.token_ids.numel()


@dataclass(frozen=True)
class Sampled:
    """What a rollout engine gives."""

    completions: list[list[Completion]]  # of each prompt
    seconds: float  # that sampling took, whether or not anybody waited for it


@dataclass(frozen=True)
class StartedRollout:
    """Prompts of a rollout that have been drawn, and their completions, which may still be on their way."""

    prompts: list[EncodedPrompt]  # this rank's share
    sampled: Future[Sampled]
    asked_for: int  # prompts over all ranks; fewer are drawn where samples are skipped
    weights_step: int  # optimizer steps that the sampling weights had seen
    source_state: Mapping[str, Any]  # of where the prompts come from, before they were drawn

    def has_failed(self) -> bool:
        """Waits for the completions; True: sampling them raised."""
        wait([self.sampled])
        return self.sampled.cancelled() or self.sampled.exception() is not None


@dataclass
class GroupScores:
    """How the completions of one prompt were judged. Filled in by the reward and advantage step."""

    parts: dict[str, Tensor]  # [G] each reward before its weight
    reward: Tensor  # [G] weighted sum of the parts, plus the concise bonus
    correct: Tensor  # [G] bool; its own tensor, never recovered from the reward
    judged: Tensor  # [G] bool; False: nobody can say whether it is correct, it counts in no pass rate
    trained: Tensor  # [G] bool; False leaves a completion out of the loss (gold not judgeable, overlong and masked)
    advantage: Tensor  # [G] after the dynamic weight
    weight: float  # dynamic weight of the group, 4 * sigma * p * (1 - p)

    @property
    def pass_rate(self) -> float:
        return float(self.correct.float().mean())


@dataclass
class PromptGroup:
    """A prompt with its completions, the unit in which advantages are computed."""

    prompt: EncodedPrompt
    completions: Sequence[Completion]
    scores: GroupScores | None = None
    old_logprobs: list[Tensor] | None = None  # [C] each; None: one optimizer step per rollout, the ratio is exactly 1
    reference_logprobs: list[Tensor] | None = None  # [C] each; None: no KL term; both: 0 where trained by another rank


@dataclass(frozen=True)
class StepTotals:
    """What one optimizer step holds over all its micro-batches and all ranks: the denominators of every objective."""

    sequences: float  # completions that are trained on
    tokens: float  # their tokens
    forwarded_tokens: float  # tokens that pass through the model, the denominator of logged means


Assignment = list[tuple[int, list[int]]]
"""The content of one micro-batch: (group, completions of that group) by number."""


@dataclass(frozen=True)
class OptimizerStep:
    """The micro-batches of one optimizer step and what they add up to."""

    micro_batches: list[Assignment]
    totals: StepTotals
    fillers: frozenset[int] = frozenset()  # micro-batches that count nothing: every step has the same number of them


@dataclass
class Experience:
    """One rollout, ready to be trained on: scored groups and how the optimizer steps deal them out."""

    groups: list[PromptGroup]  # that this rank sampled: each is on one rank only, whoever trains it
    steps: list[OptimizerStep]  # of this rank
    metrics: dict[str, float] = field(default_factory=dict)  # by logging name, over all ranks
    verdicts: dict[str, int] = field(default_factory=dict)  # how answers were judged, on all ranks
    received: list[PromptGroup] = field(default_factory=list)  # from ranks that sampled them, without their pictures

    @property
    def trained_groups(self) -> list[PromptGroup]:
        """The groups that `steps` number. Not all of those that this rank sampled need be trained here."""
        return [*self.groups, *self.received]

    def __len__(self) -> int:
        return sum(len(step.micro_batches) for step in self.steps)


@dataclass
class GroupSlice:
    """Some or all completions of one group, as one micro-batch trains them."""

    prompt: EncodedPrompt
    completions: list[Tensor]  # token ids [C] each

    def to(self, device: torch.device | str) -> GroupSlice:
        return _to_device(self, torch.device(device))


@dataclass
class MicroBatch:
    """What `training_step` receives. The T tokens are the completions of `slices` in order, without padding."""

    slices: list[GroupSlice]
    lengths: Tensor  # [N] long, T = lengths.sum()
    advantages: Tensor  # [N] float32
    trained: Tensor  # [N] float32, 0 leaves a completion out of the loss
    sampler_logprobs: Tensor  # [T] float32
    totals: StepTotals
    last_of_step: bool  # the optimizer steps after this micro-batch
    is_filler: bool = False  # passes through the model and counts nothing
    old_logprobs: Tensor | None = None  # [T] float32
    reference_logprobs: Tensor | None = None  # [T] float32

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same micro-batch with its tensors on `device`. Dtypes stay: log-probs must not become bf16."""
        return _to_device(self, torch.device(device))


Value = TypeVar("Value")


class Sealed(Generic[Value]):
    """A batch on its way through Lightning, which looks into containers and dataclasses to cast what it finds there.

    Under `bf16-true` it would turn log-probs into bf16, and the ratio of the first step would no longer be 1.
    """

    def __init__(self, content: Value) -> None:
        self.content = content

    def to(self, device: torch.device | str, **_: Any) -> Sealed[Value]:
        """With a micro-batch moved to `device`; questions stay, a rollout engine knows where it wants them."""
        return Sealed(cast(Value, self.content.to(device))) if isinstance(self.content, MicroBatch) else self


def _to_device(value: Value, device: torch.device) -> Value:
    """`value` with every tensor in it on `device`; dataclasses and lists are rebuilt, everything else is shared."""
    moved: Any = value
    if isinstance(value, Tensor):
        moved = value.to(device, non_blocking=True)
    elif isinstance(value, list):
        moved = [_to_device(item, device) for item in value]
    elif isinstance(value, MicroBatch | GroupSlice | EncodedPrompt | VisionInputs | ImageFeatures):
        changes = {f.name: _to_device(getattr(value, f.name), device) for f in dataclasses.fields(value)}
        moved = dataclasses.replace(value, **changes)
    return cast(Value, moved)
