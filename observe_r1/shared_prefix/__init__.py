"""Log-probs of completions with each prompt computed once for all completions of its group, gradients included."""

from observe_r1.shared_prefix.attention import BACKENDS, NAME, PrefixAttention, choose_backend
from observe_r1.shared_prefix.forward import shared_prefix_logprobs
from observe_r1.shared_prefix.layout import PackedRow, pack
from observe_r1.shared_prefix.self_check import disagreement

__all__ = [
    "BACKENDS",
    "NAME",
    "PackedRow",
    "PrefixAttention",
    "choose_backend",
    "disagreement",
    "pack",
    "shared_prefix_logprobs",
]
