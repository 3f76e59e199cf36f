"""The policy: a Hugging Face vision-language model that gives log-probabilities of completions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from observe_r1.experience import EncodedPrompt, GroupSlice
from observe_r1.hf_directory import save_pretrained
from observe_r1.logprobs import LogprobHead, TokenLogprobs
from observe_r1.model_inputs import encode_images, takes_image_features
from observe_r1.offloading import OffloadedWeights
from observe_r1.padded import padded_logprobs
from observe_r1.quantization import dequantized, full_shape_and_dtype, is_quantized, kind_of
from observe_r1.ranks import any_rank
from observe_r1.sharding import blank_prompt, full_shape, gathered, kept_whole, reshard, whole
from observe_r1.shared_prefix import NAME as PREFIX_ATTENTION
from observe_r1.shared_prefix import choose_backend, disagreement, shared_prefix_logprobs
from observe_r1.text_attention import set_text_attention, text_attention
from observe_r1.token_cost import TokenCost

VISION_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


class Policy(nn.Module):
    """A vision-language model as GRPO sees it: log-probs of completions, given their prompts."""

    def __init__(
        self,
        model: Any,
        pad_token_id: int,
        chunk_tokens: int = 512,
        shares_prefixes: bool = True,
        prefix_attention: str = "auto",
    ) -> None:
        super().__init__()
        self.model = model
        self.pad_token_id = pad_token_id
        self.chunk_tokens = chunk_tokens
        self.shares_prefixes = shares_prefixes
        self.prefix_attention = prefix_attention
        self.in_lockstep = False  # weights are gathered in every call, so every rank has to call equally often
        self.offloaded: OffloadedWeights | None = None  # weights that are on the device only `at_hand`
        self._backend: str | None = None  # of the packed forward; None: not compared with the plain one yet
        found = (getattr(model.config, name, None) for name in VISION_TOKENS)
        # sampled vision placeholders would ask for image features that do not exist
        self.forbidden_token_ids: tuple[int, ...] = tuple(sorted({i for i in found if i is not None}))
        if shares_prefixes:
            self._plain_attention = set_text_attention(self.transformer, PREFIX_ATTENTION)

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def transformer(self) -> Any:
        """The Hugging Face model itself, without the wrapper that adapters put around it."""
        return self.model.get_base_model() if self.has_adapters else self.model

    @property
    def has_adapters(self) -> bool:
        return hasattr(self.model, "peft_config")

    def forbidden(self, device: torch.device) -> Tensor:
        """[F] ids that can never be sampled."""
        return torch.tensor(self.forbidden_token_ids, dtype=torch.long, device=device)

    @property
    def trains_vision(self) -> bool:
        """Some weight of the vision tower is trained, so the features of an image change with every step."""
        return any(parameter.requires_grad for parameter in self._vision_weights())

    def _vision_weights(self) -> Iterator[nn.Parameter]:
        tower = getattr(self.transformer.model, "visual", None)
        return iter(()) if tower is None else tower.parameters()

    def encode_images(self, prompts: Sequence[EncodedPrompt]) -> list[EncodedPrompt]:
        """The prompts with their image features, where the tower is frozen: later forwards then leave it out.

        Not in lockstep: ranks have different numbers of images.
        """
        if self.in_lockstep or self.trains_vision or not takes_image_features(self.transformer.model):
            return list(prompts)
        return [encode_images(self.transformer.model, prompt) for prompt in prompts]

    def token_cost(self) -> TokenCost:
        """What training on a prompt and its completions costs, to balance micro-batches by."""
        return TokenCost.of(self.model.config, vision=self.trains_vision, repeated_prompts=not self.shares_prefixes)

    def forward(self, slices: Sequence[GroupSlice], temperature: float, with_entropy: bool = False) -> TokenLogprobs:
        """Log-probs at the T completion tokens of `slices`, in order."""
        prompts = self.encode_images([part.prompt for part in slices])
        slices = [GroupSlice(prompt, part.completions) for prompt, part in zip(prompts, slices, strict=True)]
        head = LogprobHead(
            self.transformer.get_output_embeddings(),
            self.forbidden(slices[0].prompt.token_ids.device),
            temperature or 1.0,
            self.chunk_tokens,
            with_entropy,
        )
        if not self.is_checked:
            self._check(slices, head)
        if self.shares_prefixes:
            assert self._backend is not None, "the check has chosen one"
            output = self._packed(slices, head, self._backend)
        else:
            output = self._padded(slices, head)
        if not self.in_lockstep and torch.is_grad_enabled() and all(part.prompt.vision is None for part in slices):
            output.logprobs = output.logprobs + self._untouched_vision()
        return output

    def next_logits(self, **inputs: Any) -> Tensor:
        """Logits [N, V] after the last position of every row, by a plain call of the model with a cache."""
        hidden = self.transformer.model(**inputs, use_cache=True).last_hidden_state[:, -1]
        logits: Tensor = self.transformer.get_output_embeddings()(hidden)
        return logits

    def blank_prompt(self, device: torch.device | None = None) -> EncodedPrompt:
        """What a rank without images, or without prompts, gives the model in lockstep with the others."""
        return blank_prompt(self.transformer.config, device)

    def at_hand(self) -> AbstractContextManager[None]:
        """Where weights are offloaded, forwards have to be inside."""
        return nullcontext() if self.offloaded is None else self.offloaded.at_hand()

    @contextmanager
    def kept_whole(self) -> Iterator[None]:
        """Gathers sharded weights once and keeps them for many calls, where the strategy can (FSDP2)."""
        before = self.in_lockstep
        with kept_whole(self) as is_whole:
            self.in_lockstep = before and not is_whole
            try:
                yield
            finally:
                self.in_lockstep = before

    @contextmanager
    def check_put_off(self) -> Iterator[None]:
        """Leaves the self-check to a later forward: made-up completions would be a poor sample for it."""
        was_checked = self.is_checked
        if not was_checked:
            self._backend = choose_backend(self.prefix_attention, self.device, self._dtype())
        try:
            yield
        finally:
            if not was_checked:
                self._backend = None

    @property
    def is_checked(self) -> bool:
        """The shared-prefix forward has been compared with the plain one, or is not used."""
        return self._backend is not None or not self.shares_prefixes

    def _packed(self, slices: Sequence[GroupSlice], head: LogprobHead, backend: str) -> TokenLogprobs:
        return self._with_an_image(
            slices, lambda slices: shared_prefix_logprobs(self.transformer.model, head, slices, backend)
        )

    def _dtype(self) -> torch.dtype:
        """In which the model computes."""
        if torch.is_autocast_enabled(self.device.type):
            return torch.get_autocast_dtype(self.device.type)
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype

    def _padded(self, slices: Sequence[GroupSlice], head: LogprobHead) -> TokenLogprobs:
        return self._with_an_image(
            slices, lambda slices: padded_logprobs(self.transformer.model, head, slices, self.pad_token_id)
        )

    def _with_an_image(
        self, slices: Sequence[GroupSlice], forward: Callable[[Sequence[GroupSlice]], TokenLogprobs]
    ) -> TokenLogprobs:
        """In lockstep the vision tower runs on every rank: a blank image joins slices without any, to no effect."""
        if not self.in_lockstep or any(part.prompt.vision is not None for part in slices):
            return forward(slices)
        nothing = GroupSlice(self.blank_prompt(self.device), [torch.zeros(1, dtype=torch.long, device=self.device)])
        output = forward([*slices, nothing])
        entropy = None if output.entropy is None else output.entropy[:-1]
        return TokenLogprobs(output.logprobs[:-1].clone(), entropy)  # FSDP2 warns of a view

    def _check(self, slices: Sequence[GroupSlice], head: LogprobHead) -> None:
        """Compares both forwards on the first groups that come, and gives up sharing where they differ."""

        def plain(sample: Sequence[GroupSlice]) -> TokenLogprobs:
            with text_attention(self.transformer, self._plain_attention):
                return self._padded(sample, head)

        chosen = choose_backend(self.prefix_attention, self.device, self._dtype())
        for backend in dict.fromkeys([chosen, *(["sdpa"] if self.prefix_attention == "auto" else [])]):

            def packed(sample: Sequence[GroupSlice], backend: str = backend) -> TokenLogprobs:
                return self._packed(sample, head, backend)

            reason = disagreement(packed, plain, slices, self._dtype())
            if (
                self.in_lockstep and reason is not None and "raised" in reason
            ):  # other ranks may wait in the middle of it
                raise ValueError(
                    f"The shared-prefix forward of sharded weights failed: {reason}. Set policy.forward: padded."
                )
            if self.in_lockstep and any_rank(reason is not None, self.device):
                reason = reason or "it does not on another rank"
            if reason is None:
                self._backend = backend
                return
        self.shares_prefixes = False
        set_text_attention(self.transformer, self._plain_attention)
        warnings.warn(
            f"The shared-prefix forward does not fit {type(self.transformer).__name__}: with attention {backend} "
            f"{reason}. Training goes on with the padded forward, which gives the same gradients and takes several "
            "times as long and as much memory (a larger trainer.accumulate_grad_batches makes smaller micro-batches). "
            "Set policy.forward: padded to skip this check.",
            stacklevel=2,
        )

    def _untouched_vision(self) -> Tensor:
        """Zero, with a gradient of zero for the vision tower: DDP waits for every parameter that it knows."""
        trainable = (parameter for parameter in self._vision_weights() if parameter.requires_grad)
        return sum((p.sum() * 0.0 for p in trainable), torch.zeros((), device=self.device))

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        """The base model, as long as the context lasts."""
        with self.model.disable_adapter():
            yield

    @property
    def end_token_ids(self) -> Tensor:
        """[E] ids that finish a completion."""
        end = self.transformer.generation_config.eos_token_id
        if end is None:
            end = self.transformer.config.get_text_config().eos_token_id
        return torch.tensor([end] if isinstance(end, int) else list(end or []), dtype=torch.long)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight once, whole, as `save_pretrained` would name it; tied weights under one of their names.

        Sharded weights are gathered one at a time: all ranks have to go through them to the end, and a rank that keeps
        none needs memory for one. Adapters are merged into a copy of one weight at a time, the model stays as it is.
        Weights in 4 bits come as they are computed with.
        What comes from a model that is neither sharded nor adapted is the weight itself, not a copy.
        """
        reshard(self)
        adapted = self._adapted_layers()
        for name, weight in self._named_parameters().items():
            layer = adapted.get(id(weight))
            with torch.no_grad(), gathered([weight, *(layer.parameters() if layer is not None else ())]):
                merged = dequantized(weight).detach()
                if layer is not None:
                    for adapter in layer.active_adapters:
                        merged = merged + layer.get_delta_weight(adapter).to(merged.dtype)
                yield name, whole(merged)

    def weight_shapes(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shape and dtype of what `named_weights` gives, in its order, without gathering anything."""
        return {
            name: full_shape_and_dtype(weight) if is_quantized(weight) else (full_shape(weight), weight.dtype)
            for name, weight in self._named_parameters().items()
        }

    def _named_parameters(self) -> dict[str, Tensor]:
        """Parameters without adapters, under the names of `save_pretrained`."""
        from transformers.core_model_loading import revert_weight_conversion

        model = self.transformer
        weights = {
            name.replace(".base_layer.", "."): weight
            for name, weight in model.named_parameters()
            if ".lora_" not in name
        }
        named: dict[str, Tensor] = revert_weight_conversion(model, weights)
        return named

    def _adapted_layers(self) -> dict[int, Any]:
        """Layers with adapters, by the identity of their base weight."""
        layers = (layer for layer in self.transformer.modules() if hasattr(layer, "get_delta_weight"))
        return {id(layer.base_layer.weight): layer for layer in layers}

    def fingerprint(self) -> dict[str, Any]:
        """What tells one architecture from another, for checkpoints of the wrong model."""
        text = self.model.config.get_text_config()
        vision = getattr(self.model.config, "vision_config", None)
        adapters = self.model.peft_config["default"].r if self.has_adapters else None
        return {
            "model_type": self.model.config.model_type,
            "hidden_size": text.hidden_size,
            "layers": text.num_hidden_layers,
            "vocab_size": text.vocab_size,
            "vision_layers": getattr(vision, "depth", None),
            "lora_rank": adapters,
            "quantization": kind_of(self.model),
        }

    def save_pretrained(self, directory: Path, writes: bool = True) -> None:
        """Writes safetensors and config as Hugging Face loads them, adapters merged.

        Args:
            directory: Made where it does not exist.
            writes: False on all ranks but one; where the weights are sharded, they have to call too.
        """
        save_pretrained(self.transformer, self.weight_shapes(), self.named_weights(), directory if writes else None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Policy:
        """Moves and casts like any module, but rotary frequencies stay float32: in bf16 they are off by up to 1/256."""
        kept = [
            (m, name, b) for m in self.modules() for name, b in m.named_buffers(recurse=False) if "inv_freq" in name
        ]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module, name, buffer in kept:
            setattr(module, name, buffer.to(getattr(module, name).device))
        return self
