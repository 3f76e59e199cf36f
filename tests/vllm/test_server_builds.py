"""`ladder build` with difficulties measured on vLLM servers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from observe_r1.ladder.manifest import Manifest
from observe_r1.ladder.reader import LadderDataset

from .comparison import NEEDS_VLLM
from .servers import Server

pytestmark = NEEDS_VLLM


def test_one_rank_and_two_build_the_same_ladder(
    tmp_path: Path, tiny_ladder: Path, command_line: Any, servers: list[Server]
) -> None:
    """Without VLLMWeightSync: nothing is trained, and the engine sends the weights once."""
    run = command_line(tmp_path)
    line = (
        "ladder", "build", "--config=ladder/build_quickstart.yaml", f"--sources=[{tiny_ladder}]",
        "--rollouts.rollout=observe_r1.rollout.VLLMServerRollout",
        f"--rollouts.rollout.servers={json.dumps([server.url for server in servers])}",
        "--rollouts.prompt.min_pixels=3136", "--rollouts.prompt.max_pixels=19600",
        "--questions_per_block=4", "--trainer.enable_progress_bar=false",
    )  # fmt: skip
    run(*line, "--output=one")
    run(*line, "--output=two", "--trainer.devices=2", "--trainer.strategy=ddp")
    built = Manifest.load(tmp_path / "one").built
    assert built["rollouts"]["engine"] == "VLLMServerRollout"
    one, two = ({prompt.id: prompt for prompt in LadderDataset(tmp_path / name)} for name in ("one", "two"))
    assert {id: prompt.n_correct for id, prompt in one.items()} == {id: prompt.n_correct for id, prompt in two.items()}
    assert len({prompt.difficulty for prompt in one.values()}) > 1
    assert all(prompt.n_rollouts == 8 for prompt in one.values())
