"""Runs first in child processes that a rollout engine starts: they import torchvision too, and not this package."""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

import observe_r1  # noqa: F401 - installs the hooks of cuda_wheels

# the environment's own sitecustomize, which this one hides
_elsewhere = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]
_hidden = PathFinder.find_spec("sitecustomize", _elsewhere)
if _hidden is not None and _hidden.loader is not None:
    _hidden.loader.exec_module(module_from_spec(_hidden))
