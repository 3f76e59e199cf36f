"""Weights that autocast casts in every call; of a frozen model they can be kept as they are computed with."""

from __future__ import annotations

import torch
from torch import nn

CAST_LAYERS = (nn.Linear, nn.Conv2d, nn.Conv3d)


def cast_weights(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that nothing but matrix products and convolutions reads.

    An output layer that is tied to the embedding is none: the embedding gives out what it holds.
    """
    cast: dict[nn.Parameter, None] = {}  # in order
    others: set[nn.Parameter] = set()
    for module in model.modules():
        # a layer that is made from one of these may do something else with its weights
        (cast.update if type(module) in CAST_LAYERS else others.update)(dict.fromkeys(module.parameters(recurse=False)))
    return [parameter for parameter in cast if parameter not in others]


def keep_cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Keeps these weights in the dtype of autocast: what a call under it gives is the same bit for bit."""
    for parameter in cast_weights(model):
        parameter.data = parameter.data.to(dtype)
