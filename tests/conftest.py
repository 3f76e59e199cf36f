"""Shared fixtures: the tiny policy, small real ladders, and settings of the test run."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from observe_r1.ladder.shards import write_ladder
from observe_r1.quickstart.questions import make_question

settings.register_profile("shared_machine", deadline=None)  # timings of a shared machine say nothing about the code
settings.load_profile("shared_machine")


@pytest.fixture(scope="session")
def tiny_ladder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 questions of the quick start in 3 shards, difficulties declared: enough for order, resume and skips."""
    directory = tmp_path_factory.mktemp("ladders") / "tiny"
    prompts = [make_question("train", seed=5, index=index).prompt() for index in range(24)]
    write_ladder(prompts, directory, samples_per_shard=8)
    return directory
