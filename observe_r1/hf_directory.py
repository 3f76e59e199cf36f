"""Writes a model as `from_pretrained` loads it, from a stream of weights: no rank ever holds more than one file's."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

FILE_BYTES = 4 * 10**9  # of one safetensors file; it is held in memory before it is written
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def save_pretrained(
    model: Any,
    shapes: Mapping[str, tuple[torch.Size, torch.dtype]],
    weights: Iterable[tuple[str, Tensor]],
    directory: Path | None,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Writes safetensors, config and generation config.

    Args:
        model: The Hugging Face model that these are weights of.
        shapes: Of all weights, in the order in which they come.
        weights: Whole, one at a time.
        directory: Made where it does not exist; None goes through the weights and writes nothing.
        file_bytes: A new file begins where one would grow beyond this.
    """
    if directory is None:
        for _ in weights:
            pass
        return
    directory.mkdir(parents=True, exist_ok=True)
    plan = _plan(shapes, file_bytes)
    dtypes = {dtype for _, dtype in shapes.values()}
    held: dict[str, Tensor] = {}
    for name, weight in weights:
        held[name] = weight.to("cpu").contiguous()
        if len(held) == len(plan[0][1]):
            (file, names), plan = plan[0], plan[1:]
            assert list(held) == names, "weights come in the order of their shapes"
            save_file(held, directory / file, metadata={"format": "pt"})
            (directory / file).chmod(0o644)  # safetensors writes private files
            held = {}
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    if hasattr(config, "quantization_config"):  # the weights that come are not
        del config.quantization_config
    config.dtype = next(iter(dtypes)) if len(dtypes) == 1 else torch.float32
    config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    _write_index(directory, shapes, _plan(shapes, file_bytes))


def _plan(shapes: Mapping[str, tuple[torch.Size, torch.dtype]], file_bytes: int) -> list[tuple[str, list[str]]]:
    """Names of the files, and of the weights in each."""
    files: list[list[str]] = [[]]
    size = 0
    for name, (shape, dtype) in shapes.items():
        weight = shape.numel() * dtype.itemsize
        if files[-1] and size + weight > file_bytes:
            files.append([])
            size = 0
        files[-1].append(name)
        size += weight
    if len(files) == 1:
        return [(SINGLE, files[0])]
    return [
        (f"model-{number:05d}-of-{len(files):05d}.safetensors", names) for number, names in enumerate(files, start=1)
    ]


def _write_index(
    directory: Path, shapes: Mapping[str, tuple[torch.Size, torch.dtype]], plan: list[tuple[str, list[str]]]
) -> None:
    if len(plan) > 1:
        total = sum(shape.numel() * dtype.itemsize for shape, dtype in shapes.values())
        where = {name: file for file, names in plan for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
