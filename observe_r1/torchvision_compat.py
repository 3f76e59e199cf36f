"""Makes torchvision's CUDA wheel importable beside a CPU-only torch; does nothing where torchvision imports.

PyPI's Linux wheel of torchvision is built for CUDA. Beside a CPU build of torch its compiled operators do not load, and
`import torchvision` dies while it attaches a fake kernel to `torchvision::nms`. Declaring the two schemas is enough for
the transforms, which are pure Python and all that transformers' Qwen processors use.
"""

from __future__ import annotations

import importlib
import sys

import torch

_libraries: list[torch.library.Library] = []  # a Library takes its operators with it when it is collected


def ensure_importable() -> None:
    """Import torchvision, declaring the schemas of its compiled operators where they are missing.

    Raises:
        ImportError: torchvision is not installed.
        RuntimeError: torchvision fails to import for any other reason.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)
        importlib.import_module("torchvision")
