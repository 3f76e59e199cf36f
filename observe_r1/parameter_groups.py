"""Groups of parameters with learning rates of their own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from typing import Any

from torch import nn


def parameter_groups(
    model: nn.Module, learning_rates: Mapping[str, float]
) -> list[nn.Parameter] | list[dict[str, Any]]:
    """Trained parameters as optimizers take them: one group for each pattern, and one for what fits none.

    Args:
        learning_rates: By shell pattern of parameter names; the first that fits decides.

    Raises:
        ValueError: Nothing is trained, a learning rate is negative, or a pattern fits no trained parameter that an
            earlier one left.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise ValueError("policy.freeze leaves no parameter to train: take a pattern out, or add policy.lora.")
    if not learning_rates:
        return list(trained.values())
    groups: dict[str | None, list[nn.Parameter]] = {pattern: [] for pattern in learning_rates}
    rest: list[nn.Parameter] = []
    for name, parameter in trained.items():
        fitting = next((pattern for pattern in learning_rates if fnmatch(name, pattern)), None)
        (rest if fitting is None else groups[fitting]).append(parameter)
    for pattern, rate in learning_rates.items():
        if rate < 0:
            raise ValueError(f"model.learning_rates: {pattern!r} has {rate}, but it must be at least 0.")
        if not groups[pattern]:
            raise ValueError(
                f"model.learning_rates: {pattern!r} fits no trained parameter that the patterns before it leave. "
                f"Patterns that fit: {', '.join(fitting_patterns(trained))}."
            )
    named: list[dict[str, Any]] = [
        {"params": groups[pattern], "lr": rate, "name": pattern} for pattern, rate in learning_rates.items()
    ]
    return [{"params": rest, "name": "other"}, *named] if rest else named


def fitting_patterns(names: Iterable[str]) -> list[str]:
    """Shell patterns that fit the parts of a model, from the names of its parameters; numbered blocks count once."""
    parts = dict.fromkeys(re.split(r"\.\d+\.|\.\w+$", name)[0] for name in names)
    return [f"{part}.*" for part in parts]
