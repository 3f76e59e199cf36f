"""Decoding of groups: a prompt is prefilled once, and all its completions read the one copy of its keys and values.

Letters in shapes: N live prompts of at most P tokens, B live sequences with C tokens so far, H heads of size D that
share K heads of keys and values, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, TopPLogitsWarper
from transformers.cache_utils import Cache, DynamicLayer

from observe_r1.experience import EncodedPrompt
from observe_r1.logprobs import sampling_logprobs
from observe_r1.model_inputs import prompt_positions, vision_arguments
from observe_r1.policy import Policy
from observe_r1.ranks import any_rank
from observe_r1.rollout.base import SamplingOptions
from observe_r1.text_attention import text_attention

ATTENTION = "observe_r1_shared_prompts"
"""Under which transformers finds the attention of a decode step."""

BLOCK_TOKENS = 64
"""By how many tokens the memory of the completions grows at a time."""

LEAVING_SHARE = 1 / 16
"""Finished sequences leave when they are this share of the batch: leaving copies what the others have in memory."""


def decode_groups(
    policy: Policy,
    prompts: Sequence[EncodedPrompt],
    sampling: SamplingOptions,
    end_token_ids: Tensor,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Decodes `sampling.group_size` completions of each prompt, all of them together.

    Args:
        prompts: Either all that have images bring features of them or none does.
        end_token_ids: [E] ids that finish a sequence.
        noise: [prompts x group_size, max_new_tokens] numbers of [0, 1) that decide what is sampled; None is greedy.

    Returns:
        Token ids [prompts x group_size, T] and their float32 log-probs before the top-p cut, on the CPU. What follows
        the first end token of a row means nothing.
    """
    device, temperature = policy.device, sampling.temperature or 1.0
    forbidden, end_token_ids = policy.forbidden(device), end_token_ids.to(device)
    noise = None if noise is None else noise.to(device)
    live = torch.arange(len(prompts) * sampling.group_size, device=device)
    finished = torch.zeros_like(live, dtype=torch.bool)
    tokens = torch.zeros(len(live), sampling.max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(tokens.shape, dtype=torch.float32, device=device)
    prefilled = prefill(policy, prompts)
    decoder = GroupDecoder(policy, prefilled, sampling.group_size)
    logits = prefilled.logits.repeat_interleave(sampling.group_size, dim=0)
    step = 0
    with text_attention(policy.transformer, ATTENTION):  # as `GroupDecoder.step` needs it, and only there
        while True:
            distribution = sampling_logprobs(logits, forbidden, temperature)
            chosen = choose(distribution, None if noise is None else noise[live, step], sampling.top_p)
            tokens[live, step] = chosen
            logprobs[live, step] = distribution.gather(1, chosen[:, None])[:, 0].float()
            step += 1
            finished |= torch.isin(chosen, end_token_ids)
            leaving = int(finished.sum())
            is_done = leaving == len(live)
            if policy.in_lockstep:  # with ranks that still decode, the last sequence to finish goes on, to no effect
                is_done = not any_rank(not is_done, device)
            if is_done or step == sampling.max_new_tokens:
                return tokens[:, :step].cpu(), logprobs[:, :step].cpu()
            if leaving and leaving >= LEAVING_SHARE * len(live) and len(live) > 1:
                rows = (~finished).nonzero()[:, 0] if leaving < len(live) else torch.zeros_like(live[:1])
                live, chosen, finished = live[rows], chosen[rows], finished[rows]
                decoder.keep(rows)
            logits = decoder.step(chosen)


def choose(logprobs: Tensor, noise: Tensor | None, top_p: float) -> Tensor:
    """[B] token ids from log-probs [B, V]: the most probable ones, or by inverse CDF at `noise` [B] within the nucleus.

    A token of probability 0 is never chosen.
    """
    if noise is None:
        return logprobs.argmax(dim=-1)
    if top_p < 1:
        logprobs = TopPLogitsWarper(top_p)(None, logprobs)
    probabilities = logprobs.exp()
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    if not bool(cumulative[:, -1].isfinite().all()):  # on a GPU the look-up would take the whole process down
        raise RuntimeError(
            "The policy's logits are not finite: the training has diverged (lower the learning rate, clip gradients), "
            "or its precision is too coarse."
        )
    chosen = torch.searchsorted(cumulative, noise[:, None] * cumulative[:, -1:], right=True)
    # a parallel sum may rise by a rounding error where it should stay
    possible = probabilities.gather(1, chosen) > 0
    return torch.where(possible, chosen, probabilities.argmax(dim=-1, keepdim=True))[:, 0]


@dataclass(frozen=True)
class Prefilled:
    """What the model made of N prompts."""

    logits: Tensor  # [N, V] of the first tokens of their completions
    cache: Cache  # keys and values [N, K, P, D] in every layer
    attended: Tensor  # [N, P] bool, False on padding
    positions: Tensor  # [rows, N] of those tokens: one row, or three of M-RoPE


def prefill(policy: Policy, prompts: Sequence[EncodedPrompt]) -> Prefilled:
    """One forward of all prompts, padded on the left, and of the vision tower on all their images.

    In lockstep the tower runs on every rank: a blank image joins prompts without any, and leaves again.

    Raises:
        ValueError: A layer of the model attends to a window of tokens only.
    """
    transformer, device, wanted = policy.transformer, policy.device, len(prompts)
    if policy.in_lockstep and all(prompt.vision is None for prompt in prompts):
        prompts = [*prompts, policy.blank_prompt()]
    backbone = transformer.model
    cache = DynamicCache(config=transformer.config.get_text_config())
    if any(cache.is_sliding):
        raise ValueError("The hf rollout cannot decode with sliding-window attention: set use_sliding_window to false.")
    width = max(prompt.token_ids.numel() for prompt in prompts)

    def pad(values: Tensor) -> Tensor:
        return F.pad(values, (width - values.shape[-1], 0))

    attended = torch.stack([pad(torch.ones_like(prompt.token_ids)) for prompt in prompts]).to(device)
    positions = torch.stack([pad(prompt_positions(backbone, prompt)) for prompt in prompts], dim=1).to(device)
    vision = vision_arguments(prompt.vision for prompt in prompts)
    logits = policy.next_logits(
        input_ids=torch.stack([pad(prompt.token_ids) for prompt in prompts]).to(device),
        attention_mask=attended,
        position_ids=_as_arguments(positions),
        past_key_values=cache,
        # the model moves features of images by itself
        **{name: value.to(device) if isinstance(value, Tensor) else value for name, value in vision.items()},
    )
    after = positions.amax(dim=(0, 2)) + 1
    if wanted < len(prompts):
        cache.batch_select_indices(torch.arange(wanted, device=device))
        logits, attended, after = logits[:wanted], attended[:wanted], after[:wanted]
    return Prefilled(logits, cache, attended.bool(), after.expand(len(positions), -1))


class GroupDecoder:
    """Decodes completions of prefilled prompts step by step.

    Args:
        group_size: Number of completions of every prompt.

    Attributes:
        completions: Keys and values of the live sequences.
    """

    def __init__(self, policy: Policy, prefilled: Prefilled, group_size: int) -> None:
        self._policy = policy
        self._prompts = SharedPrompts(prefilled.cache, prefilled.attended, group_size)
        self.completions = Cache(layers=[CompletionLayer(self._prompts.dtype) for _ in prefilled.cache.layers])
        self._positions = prefilled.positions.repeat_interleave(group_size, dim=1)  # [rows, B] of the next tokens

    def step(self, tokens: Tensor) -> Tensor:
        """Logits [B, V] of what follows `tokens` [B], the newest of every live sequence."""
        logits = self._policy.next_logits(
            input_ids=tokens[:, None],
            position_ids=_as_arguments(self._positions[:, :, None]),
            past_key_values=self.completions,
            shared_prompts=self._prompts,
        )
        self._positions = self._positions + 1
        return logits

    def keep(self, rows: Tensor) -> None:
        """Goes on with these of the B live sequences, in ascending order."""
        self._positions = self._positions[:, rows]
        self._prompts.keep(rows)
        self.completions.batch_select_indices(rows)


def _as_arguments(positions: Tensor) -> Tensor:
    """Positions [rows, N, P] in the shape that the model takes: models without M-RoPE know no rows."""
    return positions if len(positions) > 1 else positions[0]


class CompletionLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values [B, K, C, D] of the completions in one layer. Grows by blocks: few steps copy what is there."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.is_initialized = False
        self._dtype = dtype
        self._length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.keys, self.values = (states[:, :, :0].to(self._dtype) for states in (key_states, value_states))
            self.is_initialized = True
        new = slice(self._length, self._length + key_states.shape[2])
        if new.stop > self.keys.shape[2]:
            added = -(-new.stop // BLOCK_TOKENS) * BLOCK_TOKENS - self.keys.shape[2]
            self.keys, self.values = (F.pad(states, (0, 0, 0, added)) for states in (self.keys, self.values))
        self.keys[:, :, new], self.values[:, :, new] = key_states, value_states
        self._length = new.stop
        return self.keys[:, :, : new.stop], self.values[:, :, : new.stop]

    def get_seq_length(self) -> int:
        return self._length


class SharedPrompts:
    """Keys and values of the live prompts, and which live sequence continues which.

    Sequences of one prompt attend to it in one product. For this they take slots, M of them for every prompt, where M
    is the most sequences that one prompt still has; a free slot repeats some sequence, and nobody reads its result.

    Args:
        cache: Left by the prefill, [N, K, P, D] in every layer; it is changed here.
        attended: [N, P] False where a prompt is padded.
        group_size: Number of sequences of every prompt, side by side.

    Attributes:
        dtype: Of keys and values; those of the completions have to be of it too.
    """

    def __init__(self, cache: Cache, attended: Tensor, group_size: int) -> None:
        device = attended.device.type
        # under autocast keys come in float32, and attention is computed in half precision all the same
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        self.dtype: torch.dtype = autocast or cache.layers[0].keys.dtype
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.to(self.dtype), layer.values.to(self.dtype)
        self._cache = cache
        self._attended = attended
        self._prompt_of = torch.arange(len(attended), device=attended.device).repeat_interleave(group_size)
        self._arrange()

    def keep(self, rows: Tensor) -> None:
        """Goes on with these sequences, in ascending order; prompts without any leave too."""
        prompts, self._prompt_of = torch.unique(self._prompt_of[rows], return_inverse=True)
        if len(prompts) < len(self._attended):
            self._cache.batch_select_indices(prompts)
            self._attended = self._attended[prompts]
        self._arrange()

    def _arrange(self) -> None:
        heads, sequences = self._cache.layers[0].keys.shape[1], len(self._prompt_of)
        counts = torch.bincount(self._prompt_of, minlength=len(self._attended))
        most = int(counts.max())
        number = torch.arange(sequences, device=counts.device) - (counts.cumsum(0) - counts)[self._prompt_of]
        taken_by = counts.new_zeros(len(counts), most)
        taken_by[self._prompt_of, number] = torch.arange(sequences, device=counts.device)
        head = torch.arange(heads, device=counts.device)
        # indices that count (sequence, head) pairs, and (prompt, head, slot) triples
        self._to_slots = (taken_by[:, None] * heads + head[:, None]).flatten()
        self._to_sequences = ((self._prompt_of[:, None] * heads + head) * most + number[:, None]).flatten()
        self._most = most
        bias = torch.zeros(self._attended.shape, device=counts.device).masked_fill(~self._attended, float("-inf"))
        self._bias = bias.repeat_interleave(heads, dim=0)[:, None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention [B, 1, H, D] of one token per sequence to its prompt and to its completion.

        Args:
            query: [B, H, 1, D].
            key: [B, K, C, D] of the completions, the newest token included; so is `value`.
        """
        sequences, heads, _, size = query.shape
        prompt_keys = self._cache.layers[layer].keys.flatten(0, 1)
        prompt_values = self._cache.layers[layer].values.flatten(0, 1)
        key, value, width = key.flatten(0, 1), value.flatten(0, 1), prompt_keys.shape[1]
        query = query.to(self.dtype).reshape(len(key), -1, size)
        own = self._in_slots(_scores(query, key))
        scores = torch.cat([_scores(self._in_slots(query), prompt_keys) + self._bias, own], dim=-1)
        weights = scores.mul_(scale).softmax(dim=-1).to(self.dtype)
        output = torch.bmm(self._by_sequence(weights[..., width:]), value)
        output += self._by_sequence(torch.bmm(weights[..., :width], prompt_values))
        return output.view(sequences, 1, heads, size)

    def _in_slots(self, states: Tensor) -> Tensor:
        """[B x K, H / K, X] -> [N x K, M x H / K, X]."""
        return states.index_select(0, self._to_slots).view(len(self._bias), -1, states.shape[-1])

    def _by_sequence(self, states: Tensor) -> Tensor:
        """[N x K, M x H / K, X] -> [B x K, H / K, X]."""
        slots = states.reshape(len(states) * self._most, -1, states.shape[-1])
        return slots.index_select(0, self._to_sequences)


def shared_prompt_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    shared_prompts: SharedPrompts,
    **_: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in every layer of a decode step."""
    assert attention_mask is None, "all sequences have equally many tokens, so there is nothing to mask"
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.autocast(query.device.type, enabled=False):
        return shared_prompts.attend(int(module.layer_idx), query, key, value, scale), None  # type: ignore[arg-type]


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """Products [X, Q, T] of query [X, Q, D] and key [X, T, D], never in half precision: the softmax would be coarse."""
    key = key.transpose(1, 2)
    wide = torch.promote_types(query.dtype, torch.float32)
    if query.is_cuda and query.dtype != wide:
        return torch.bmm(query, key, out_dtype=wide)
    return torch.bmm(query.to(wide), key.to(wide))


# transformers makes no mask for an attention without a mask function of its own
AttentionInterface.register(ATTENTION, shared_prompt_attention)
