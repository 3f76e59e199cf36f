"""What tensors would take up, for code that runs on tensors without memory.

Torch's fake tensors know shape and dtype of everything that a forward, a backward or an optimizer computes, and have no
numbers. Here they stand for weights, activations and pixels, while token ids and positions stay real, because models
look at them. Every operator passes by, so it is known at any time how many bytes are alive.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

BACKWARD, CAST = "backward", "weights cast to compute"
"""Parts that are told by what happens: gradients on their way, and copies of weights that autocast makes."""

LARGE = 2**20
"""Elements from which index tensors have no memory either: masks, whose values nobody asks for."""


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of fake tensors that are alive, by what they are for; code inside runs under it.

    Attributes:
        live: Bytes by part, now.
        at_peak: Bytes by part when there were most.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.live: Counter[str] = Counter()
        self.at_peak: dict[str, int] = {}
        self._total = self._peak = 0
        self._part = "other"
        self._inside = 0  # of how many named modules
        self._storages: dict[int, tuple[str, int]] = {}
        self._weights: set[int] = set()

    # ---- tensors without memory --------------------------------------------------------------------------------------

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A tensor without memory that counts."""
        with self.fake:
            tensor = torch.empty(shape, dtype=dtype)
        self._count(tensor)
        return tensor

    def fill(self, module: nn.Module, dtype: torch.dtype | None = None) -> None:
        """Gives a module on the meta device fake weights, shared ones shared, and buffers.

        Args:
            dtype: Of weights of floating point; None: theirs.
        """
        made: dict[int, nn.Parameter] = {}
        for part in module.modules():
            for name, old in part._parameters.items():
                if old is None:
                    continue
                if id(old) not in made:
                    made[id(old)] = nn.Parameter(
                        self.empty(*old.shape, dtype=dtype or old.dtype), requires_grad=old.requires_grad
                    )
                    self._weights.add(made[id(old)].untyped_storage()._cdata)
                part._parameters[name] = made[id(old)]
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = self.empty(*buffer.shape, dtype=buffer.dtype)

    # ---- counting ----------------------------------------------------------------------------------------------------

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is made inside counts as this part."""
        before, self._part = self._part, name
        try:
            yield
        finally:
            self._part = before

    def name_parts(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        """What these modules make in their forwards, recomputed ones too, counts as the part they come with."""

        def enter(name: str) -> Any:
            def hook(module: nn.Module, *_: Any) -> None:
                module.__dict__.setdefault("_parts_before", []).append(self._part)
                self._part, self._inside = name, self._inside + 1

            return hook

        def leave(module: nn.Module, *_: Any) -> None:
            self._part, self._inside = module.__dict__["_parts_before"].pop(), self._inside - 1

        for name, module in modules:
            module.register_forward_pre_hook(enter(name))
            module.register_forward_hook(leave, always_call=True)

    def rename(self, tensor: Tensor, part: str) -> None:
        """What this tensor is for turned out later."""
        key = tensor.untyped_storage()._cdata
        before, size = self._storages[key]
        self._storages[key] = (part, size)
        self.live[before] -= size
        self.live[part] += size

    def start_anew(self) -> None:
        """Forgets the peak so far."""
        self._peak, self.at_peak = self._total, dict(self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [*_tensors(args), *_tensors(kwargs.values())]
        if any(isinstance(tensor, FakeTensor) for tensor in tensors):
            out = func(*args, **kwargs)  # they see to it that all of it is fake
        elif self._needs_no_memory(func, tensors, args, kwargs):
            with self.fake:
                out = func(*args, **kwargs)
        else:
            return func(*args, **kwargs)
        casts = func is torch.ops.aten._to_copy.default and self._is_weight(args[0])
        for tensor in _tensors([out]):
            if isinstance(tensor, FakeTensor):
                self._count(tensor, CAST if casts else None)
        return out

    def _needs_no_memory(self, func: Any, tensors: list[Tensor], args: Any, kwargs: Any) -> bool:
        """Whether what an operator on real tensors, or on none, gives should be fake: numbers, and large masks."""
        if tensors and max(tensor.numel() for tensor in tensors) ** 2 < LARGE:
            return False
        try:
            with self.fake:
                out = func(*args, **kwargs)
        except Exception:  # it looks at values
            return False
        made = list(_tensors([out]))
        if not tensors and any(tensor.is_floating_point() and tensor.dim() for tensor in made):
            return True
        return any(tensor.numel() >= LARGE for tensor in made) and not any(
            tensor.is_floating_point() for tensor in tensors
        )

    def _is_weight(self, tensor: Any) -> bool:
        return isinstance(tensor, FakeTensor) and tensor.untyped_storage()._cdata in self._weights

    def _count(self, tensor: Tensor, part: str | None = None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        in_backward = torch._C._current_graph_task_id() >= 0 and not self._inside
        part, size = part or (BACKWARD if in_backward else self._part), storage.nbytes()
        self._storages[key] = (part, size)
        self.live[part] += size
        self._total += size
        if self._total > self._peak:
            self.start_anew()
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        part, size = self._storages.pop(key)
        self.live[part] -= size
        self._total -= size


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those among the arguments of an operator, in lists too."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
