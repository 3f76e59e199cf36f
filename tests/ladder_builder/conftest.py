"""Questions of the quick start as a user would bring them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from observe_r1.answers import Gold
from observe_r1.ladder.shards import write_ladder
from observe_r1.quickstart.questions import make_question


@pytest.fixture
def questions(tmp_path: Path) -> Callable[..., Path]:
    """Writes a ladder of quick-start questions without difficulties; `golds` replaces some of their answers."""

    def make(name: str, count: int, start: int = 0, golds: dict[int, Gold] | None = None) -> Path:
        prompts = [make_question("train", 7, index).prompt() for index in range(start, start + count)]
        for index, gold in (golds or {}).items():
            prompts[index] = dataclasses.replace(prompts[index], gold=gold)
        write_ladder(prompts, tmp_path / name, samples_per_shard=20)
        return tmp_path / name

    return make
