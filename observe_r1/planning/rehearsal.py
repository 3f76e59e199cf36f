"""The phases of a training, run by the trainer's own code on a model without memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.optim import Optimizer

from observe_r1.autocast_weights import cast_weights
from observe_r1.experience import EncodedPrompt, MicroBatch
from observe_r1.fitting import dearest, forward_and_backward
from observe_r1.loading import blocks_of, load_policy, vocabulary_layers
from observe_r1.logprobs import sampling_logprobs
from observe_r1.parameter_groups import parameter_groups
from observe_r1.planning.live_memory import LiveMemory
from observe_r1.planning.setup import Setup
from observe_r1.policy import Policy
from observe_r1.quantization import chosen_layers
from observe_r1.rollout import HFRollout
from observe_r1.rollout.decoding import ATTENTION, BLOCK_TOKENS, GroupDecoder, choose, prefill
from observe_r1.shared_prefix import choose_backend
from observe_r1.text_attention import text_attention

Parts = dict[str, int]
"""Bytes by what they are for."""

WEIGHTS, GRADIENTS, OPTIMIZER = "weights", "gradients", "optimizer state"
TOWER, TEXT, HEAD = "vision tower", "text blocks", "log-prob head"
CACHE, DECODING = "key-value cache", "decode step"


@dataclass(frozen=True)
class Counts:
    """Parameters of a model, counted in it.

    Args:
        largest_block: Of the largest block that is gathered apart from others.
        rest: Outside of all blocks: embeddings, head, merger.
        quantized: That quantisation would pack.
        largest_quantized: Of one layer.
        cast: That autocast casts to compute with; the reference model keeps them so.
        cast_rest: Of them, outside of all blocks.
        cast_in_block: Of them, in the block that has most.
        vocabulary: Of `rest`, in an embedding and an output layer that are gathered apart: each has half of them.
        trained_vocabulary: Of them, in one or both.
    """

    total: int
    trained: int
    largest_block: int
    rest: int
    trained_rest: int
    trained_in_block: int
    quantized: int = 0
    largest_quantized: int = 0
    cast: int = 0
    cast_rest: int = 0
    cast_in_block: int = 0
    vocabulary: int = 0
    trained_vocabulary: int = 0

    @property
    def root(self) -> int:
        """What FSDP2 keeps whole from the forward to the end of the backward."""
        return self.rest - self.vocabulary

    @property
    def trained_root(self) -> int:
        return self.trained_rest - self.trained_vocabulary

    @property
    def vocabulary_layer(self) -> int:
        """Either of an embedding and an output layer that are gathered apart."""
        return self.vocabulary // 2

    @property
    def trained_in_vocabulary_layer(self) -> int:
        return min(self.vocabulary_layer, self.trained_vocabulary)


class Rehearsal:
    """A model without memory, and what passes of it would take.

    Args:
        setup: The run; `policy.pretrained` has to be a name whose config can be read.
        on_gpu: The passes will run on a GPU, whose attention kernels are others.
    """

    def __init__(self, setup: Setup, on_gpu: bool) -> None:
        self.setup = setup
        self.memory = LiveMemory()
        # gathered weights come in the dtype they are computed with
        kept = setup.compute_dtype if setup.spread.gathers_weights or setup.spread.is_zero else setup.dtype
        self.policy = load_policy(setup.policy, kept, empty=True)
        self.counts = count(self.policy)
        with self.memory.part(WEIGHTS):
            self.memory.fill(self.policy.model)
        self.policy.in_lockstep = setup.spread.gathers_weights
        if setup.spread.kind == "zero3":
            self.policy.transformer.get_output_embeddings().weight.ds_id = 0  # the head goes through its module there
        self.policy._backend = self._attention_backend(on_gpu)
        backbone = self.policy.transformer.model
        parts: list[tuple[str, nn.Module]] = [(TEXT, getattr(backbone, "language_model", backbone))]
        if hasattr(backbone, "visual"):
            parts.append((TOWER, backbone.visual))
        # blocks too: checkpointing calls them again, outside of the model they belong to
        parts += [(name, block) for name, part in parts for block in blocks_of(part)]
        self.memory.name_parts(parts)
        self._keeps_gradients = setup.spread.kind in ("single", "ddp")
        for parameter in self._trained():
            parameter.register_post_accumulate_grad_hook(self._after_gradient)

    # ---- phases ------------------------------------------------------------------------------------------------------

    def training(self, prompt: EncodedPrompt, length: int) -> tuple[MicroBatch, Parts]:
        """The dearest micro-batch, and what its forward and backward take beside weights and gradients."""
        setup = self.setup
        self._merge_windows(prompt)
        batch = dearest(
            self.policy,
            prompt,
            prompts=setup.prompts_per_rank,
            group_size=setup.sampling.group_size,
            length=length,
            steps=setup.updates.steps_per_rollout,
            micro_batches=setup.micro_batches,
        )
        with self.memory, self.memory.part(GRADIENTS):
            for parameter in self._trained():
                parameter.grad = torch.zeros_like(parameter) if self._keeps_gradients else None
        with self._counting() as parts, self.memory.part(HEAD):
            forward_and_backward(self.policy, replace(batch), setup.sampling.temperature, self._autocast())
        for parameter in self._trained():
            parameter.grad = None
        return batch, parts

    def logprobs(self, batch: MicroBatch, of_frozen: bool = False) -> Parts:
        """What a pass without gradient over a micro-batch takes.

        Args:
            of_frozen: Of a reference model.
        """
        weights = self._frozen() if of_frozen else nullcontext()
        with weights, self._counting() as parts, self.memory.part(HEAD), torch.no_grad(), self._autocast():
            self.policy(batch.slices, self.setup.sampling.temperature)
        return parts

    def sampling(self, prompt: EncodedPrompt, length: int) -> Parts:
        """What the hf rollout takes: reading a batch of prompts, and the last step of its longest completions."""
        engine, sampling = self.setup.engine, self.setup.sampling
        assert isinstance(engine, HFRollout)
        prompts = next(iter(engine.batches([prompt] * self.setup.prompts_per_rank, sampling.group_size)))
        was_in_lockstep, self.policy.in_lockstep = self.policy.in_lockstep, False
        self._merge_windows(prompt)
        self.policy.eval()
        try:
            with self._counting() as parts, torch.no_grad(), self._autocast():
                self._sample(self.policy.encode_images(prompts), length)
        finally:
            self.policy.train()
            self.policy.in_lockstep = was_in_lockstep
        return parts

    def _sample(self, prompts: list[EncodedPrompt], length: int) -> None:
        policy, size = self.policy, self.setup.sampling.group_size
        with self.memory.part(DECODING):
            prefilled = prefill(policy, prompts)
        for layer in prefilled.cache.layers:
            self.memory.rename(layer.keys, CACHE)
            self.memory.rename(layer.values, CACHE)
        with self.memory.part(CACHE):
            decoder = GroupDecoder(policy, prefilled, size)
        logits = prefilled.logits.repeat_interleave(size, dim=0)
        with text_attention(policy.transformer, ATTENTION):
            text = policy.model.config.get_text_config()
            head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
            shape = (len(logits), text.num_key_value_heads)
            with self.memory.part(CACHE):
                # all tokens but the last, the last block of them by itself: growing takes memory, too
                full = max((length - 2) // BLOCK_TOKENS, 0) * BLOCK_TOKENS
                for layer in decoder.completions.layers:
                    for tokens in filter(None, (full, length - 1 - full)):
                        keys = self.memory.empty(*shape, tokens, head_size, dtype=self.setup.compute_dtype)
                        layer.update(keys, keys)
                        del keys
            with self.memory.part(DECODING):
                logits = decoder.step(torch.full((len(logits),), 7))
                distribution = sampling_logprobs(logits, policy.forbidden(logits.device), 1.0)
                with suppress(DataDependentOutputException):  # it has made all it makes, and looks at the numbers
                    choose(distribution, torch.zeros(len(logits), dtype=torch.float64), self.setup.sampling.top_p)

    def optimizer(self, parameters: list[nn.Parameter] | None, on_gpu: bool) -> tuple[int, int]:
        """Bytes that the configured optimizer keeps, and that its step takes beside them.

        Args:
            parameters: What it is given, on this rank; None: the trained parameters as they are.
        """
        given: Any = parameters or parameter_groups(self.policy.model, {})
        optimizer = self.setup.optimizer(given)
        if on_gpu:
            _in_one_go(optimizer)
        with self.memory, self.memory.part(GRADIENTS):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
        with self._counting() as parts, self.memory.part(OPTIMIZER), torch.no_grad():
            optimizer.step()
        kept = self.memory.live[OPTIMIZER]
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        return kept, max(sum(parts.values()) - kept, 0)

    # ---- parts -------------------------------------------------------------------------------------------------------

    def shards(self, dtype: torch.dtype) -> list[nn.Parameter]:
        """Parts of the trained parameters, as FSDP2 gives them to the first rank: cut along their first dimension."""
        parts = self.setup.spread.parts
        return [
            nn.Parameter(self.memory.empty(-(-p.shape[0] // parts), *p.shape[1:], dtype=dtype)) for p in self._trained()
        ]

    def flat(self, dtype: torch.dtype) -> list[nn.Parameter]:
        """This rank's part of the trained parameters, one after the other in one tensor, as ZeRO has it."""
        return [nn.Parameter(self.memory.empty(-(-self.counts.trained // self.setup.spread.parts), dtype=dtype))]

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.policy.parameters() if parameter.requires_grad]

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """The weights are those of a reference model: autocast keeps no copies of them, and has no need of any."""
        trained = self._trained()
        before = {parameter: parameter.data for parameter in cast_weights(self.policy)} if self._is_cast else {}
        for parameter in trained:
            parameter.requires_grad_(False)
        with self.memory.part(WEIGHTS):
            for parameter in before:
                parameter.data = self.memory.empty(*parameter.shape, dtype=self.setup.compute_dtype)
        try:
            yield
        finally:
            for parameter, weight in before.items():
                parameter.data = weight
            for parameter in trained:
                parameter.requires_grad_(True)

    def _after_gradient(self, parameter: nn.Parameter) -> None:
        if not self._keeps_gradients:
            parameter.grad = None  # reduced to a part and freed

    def _attention_backend(self, on_gpu: bool) -> str:
        """Of the packed forward, there where the training will run."""
        wanted = self.setup.policy.prefix_attention
        if not on_gpu:
            return choose_backend(wanted, torch.device("cpu"), self.setup.compute_dtype)
        if wanted == "sdpa" or self.setup.compute_dtype == torch.float32:
            return "sdpa"
        return "varlen"  # flash-attn keeps the same

    @property
    def _is_cast(self) -> bool:
        """By autocast, which DeepSpeed does without."""
        return self.setup.is_mixed and not self.setup.spread.is_zero

    def _autocast(self) -> Any:
        return torch.autocast("cpu", self.setup.compute_dtype) if self._is_cast else nullcontext()

    @contextmanager
    def _counting(self) -> Iterator[Parts]:
        """What is alive at the peak inside, beside weights and gradients."""
        parts: Parts = {}
        with self.memory:
            self.memory.start_anew()
            yield parts
        found = {
            name: size
            for name, size in self.memory.at_peak.items()
            if name not in (WEIGHTS, GRADIENTS, "other") and size
        }
        parts.update(found)

    def _merge_windows(self, prompt: EncodedPrompt) -> None:
        """One window for an image: what attention keeps grows with tokens, not with windows, and hundreds take time."""
        tower: Any = getattr(self.policy.transformer.model, "visual", None)
        if prompt.vision is None or not hasattr(tower, "window_size"):
            return
        tower.window_size = max(tower.config.window_size, int(prompt.vision.image_grid_thw.max()) * tower.patch_size)


def count(policy: Policy) -> Counts:
    """Parameters of a policy; shared ones count once."""
    blocks = blocks_of(policy)
    in_blocks = {id(parameter) for block in blocks for parameter in block.parameters()}
    parameters = list(policy.parameters())
    rest = [parameter for parameter in parameters if id(parameter) not in in_blocks]

    def trained(some: Any) -> int:
        return sum(parameter.numel() for parameter in some if parameter.requires_grad)

    vocabulary = [parameter for layer in vocabulary_layers(policy) for parameter in layer.parameters()]
    by_autocast = {id(parameter) for parameter in cast_weights(policy)}

    def cast(some: Any) -> int:
        return sum(parameter.numel() for parameter in some if id(parameter) in by_autocast)

    return Counts(
        total=sum(parameter.numel() for parameter in parameters),
        trained=trained(parameters),
        largest_block=max((sum(p.numel() for p in block.parameters()) for block in blocks), default=0),
        rest=sum(parameter.numel() for parameter in rest),
        trained_rest=trained(rest),
        trained_in_block=max((trained(block.parameters()) for block in blocks), default=0),
        quantized=sum(layer.weight.numel() for layer in chosen_layers(policy.model)),
        largest_quantized=max((layer.weight.numel() for layer in chosen_layers(policy.model)), default=0),
        cast=cast(parameters),
        cast_rest=cast(rest),
        cast_in_block=max((cast(block.parameters()) for block in blocks), default=0),
        vocabulary=sum(parameter.numel() for parameter in vocabulary),
        trained_vocabulary=trained(vocabulary),
    )


def _in_one_go(optimizer: Optimizer) -> None:
    """As torch chooses on a GPU, where nothing is configured: all parameters in one call (`foreach`)."""
    for group in optimizer.param_groups:
        if group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True
