"""Frozen weights that stay in the memory of the CPU and are on the device while they are used.

Nothing is copied back: they never change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class OffloadedWeights:
    """The weights of a frozen module, fetched for the time of its calls.

    Args:
        module: On the CPU. Its buffers go to the device for good.
        blocks: Parts that are fetched when they are called and let go after it, one at a time; whatever belongs to none
            of them, or everything where there are none, is on the device while `at_hand` lasts.
        device: That computes.
    """

    def __init__(self, module: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self.device = device
        for part in module.modules():
            for name, buffer in part.named_buffers(recurse=False):
                part._buffers[name] = buffer.to(device)
        self._home: dict[nn.Parameter, Tensor] = {}
        for parameter in module.parameters():  # one at a time: there is no memory for all of them twice
            self._home[parameter] = parameter.data = _pinned(parameter.data, device)
        inside = {parameter for block in blocks for parameter in block.parameters()}
        self._outside = [parameter for parameter in self._home if parameter not in inside]
        for block in blocks:
            block.register_forward_pre_hook(self._before)
            block.register_forward_hook(self._after, always_call=True)

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """The module can be called inside."""
        self._fetch(self._outside)
        try:
            yield
        finally:
            self._send_home(self._home)

    def _before(self, block: nn.Module, _: Any) -> None:
        self._fetch(block.parameters())

    def _after(self, block: nn.Module, *_: Any) -> None:
        self._send_home(block.parameters())

    def _fetch(self, parameters: Any) -> None:
        for parameter in parameters:
            # in the order of the device's work, so nothing is computed with before it is there
            parameter.data = self._home[parameter].to(self.device, non_blocking=True, copy=True)

    def _send_home(self, parameters: Any) -> None:
        for parameter in parameters:
            parameter.data = self._home[parameter]


def _pinned(weight: Tensor, device: torch.device) -> Tensor:
    """In memory that a GPU can read from by itself."""
    return weight.pin_memory() if device.type == "cuda" else weight
