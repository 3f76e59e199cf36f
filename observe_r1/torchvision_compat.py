"""Makes torchvision's CUDA wheel importable beside a CPU-only torch; does nothing where torchvision imports.

PyPI's Linux wheel of torchvision is built for CUDA. Beside a CPU build of torch its compiled operators do not load, and
`import torchvision` dies while it attaches a fake kernel to `torchvision::nms`. Declaring the two schemas is enough for
the transforms, which are pure Python and all that transformers and torchmetrics import it for.

`install` hooks the import of torchvision, so that it works from wherever it is imported, and imports nothing itself.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_kept: list[Any] = []  # a torch Library takes its operators with it when it is collected


def install() -> None:
    """Watches for the first import of torchvision. Calling it again changes nothing."""
    if "torchvision" not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torchvision":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _SecondTry(spec.loader)
        return spec


class _SecondTry(Loader):
    """Runs the module; where its compiled operators are missing, declares them and runs it again."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader  # resources and reloads go to the real one
        try:
            self._loader.exec_module(module)
        except RuntimeError as error:
            if "torchvision::nms does not exist" not in str(error):
                raise
            for name in [name for name in sys.modules if name.startswith("torchvision.")]:
                del sys.modules[name]
            _declare_operators()
            self._loader.exec_module(module)


def _declare_operators() -> None:
    import torch

    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)
