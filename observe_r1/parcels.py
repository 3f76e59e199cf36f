"""Prompt groups as bytes, on their way from the rank that sampled them to the one that trains them.

The structure is pickled, tensors lie behind it as they are: no copy through a pickle, and one buffer for all of them.
Both ends are processes of the same training.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from observe_r1.experience import EncodedPrompt, PromptGroup

ALIGNMENT = 16  # bytes; a tensor begins where any dtype may


def pack(groups: Sequence[PromptGroup]) -> Tensor:
    """[bytes] uint8. Pictures stay behind: the model reads what the image processor made of them."""
    if not groups:
        return torch.empty(0, dtype=torch.uint8)
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump([dataclasses.replace(group, prompt=_for_training(group.prompt)) for group in groups])
    structure = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    pieces = [torch.tensor([len(structure)]).view(torch.uint8), structure, *map(_bytes_of, pickler.tensors)]
    return torch.cat([padded for piece in pieces for padded in (piece, piece.new_zeros(-len(piece) % ALIGNMENT))])


def unpack(parcel: Tensor) -> list[PromptGroup]:
    """The groups that `pack` was given. Tensors are copies, so that none keeps the parcel in memory."""
    if not len(parcel):
        return []
    length = int(parcel[:8].view(torch.int64))
    structure = parcel[ALIGNMENT : ALIGNMENT + length].numpy().tobytes()
    groups: list[PromptGroup] = _Unpickler(structure, parcel, ALIGNMENT + _padded(length)).load()
    return groups


class _Pickler(pickle.Pickler):
    """Puts tensors aside: in their place stay their dtype and shape."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        self.tensors.append(value)
        return value.dtype, tuple(value.shape)


class _Unpickler(pickle.Unpickler):
    """Takes tensors from behind the structure, in the order in which they were put aside."""

    def __init__(self, structure: bytes, parcel: Tensor, start: int) -> None:
        super().__init__(io.BytesIO(structure))
        self.parcel = parcel
        self.position = start

    def persistent_load(self, pid: Any) -> Tensor:
        dtype, shape = pid
        size = dtype.itemsize * torch.Size(shape).numel()
        piece = self.parcel[self.position : self.position + size]
        self.position += _padded(size)
        return piece.view(dtype).reshape(shape).clone()


def _for_training(prompt: EncodedPrompt) -> EncodedPrompt:
    vision = prompt.vision
    if vision is not None and vision.features is not None:  # of a frozen tower, which will not run again
        vision = dataclasses.replace(vision, pixel_values=vision.pixel_values[:0])
    return dataclasses.replace(prompt, prompt=dataclasses.replace(prompt.prompt, images=[]), vision=vision)


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _padded(size: int) -> int:
    return size + -size % ALIGNMENT
