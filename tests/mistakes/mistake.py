"""What a row of the tables is: a mistake, the files around it, the command, and the words of the answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree
from typing import Any

import torch


@dataclass(frozen=True)
class World:
    """What mistakes are made with."""

    directory: Path
    ladder: Path
    other_ladder: Path
    checkpoint: Path


Prepare = Callable[[World], object]


@dataclass(frozen=True)
class Mistake:
    name: str
    arguments: tuple[str, ...]
    expected: tuple[str, ...]
    prepare: Prepare = lambda world: None
    command: str = "fit"
    code: int = 1
    on_its_own: bool = False  # the arguments are all there are
    absent: str = ""  # a package without which it is a mistake


def file(name: str, text: str) -> Prepare:
    return lambda world: (world.directory / name).write_text(text)


def config(**content: Any) -> Prepare:
    return file("mine.yaml", json.dumps(content))  # JSON is YAML


def changed_ladder(change: Callable[[Path], object]) -> Prepare:
    return lambda world: change(Path(copytree(world.ladder, world.directory / "ladder")))


def changed_checkpoint(change: Callable[[dict[str, Any]], object]) -> Prepare:
    def prepare(world: World) -> None:
        content = torch.load(world.checkpoint, weights_only=True)
        change(content)
        torch.save(content, world.directory / "changed.ckpt")

    return prepare


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def model_without(*patterns: str) -> Prepare:
    def prepare(world: World) -> None:
        import observe_r1.quickstart

        copy = world.directory / "model"
        copytree(Path(observe_r1.quickstart.__path__[0]) / "policy", copy)
        for pattern in patterns:
            for path in copy.glob(pattern):
                path.unlink()

    return prepare


MINE = ("--config=mine.yaml",)
