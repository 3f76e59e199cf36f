"""The parts of the benchmarks that count instead of measuring time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def case(name: str) -> Any:
    command = [sys.executable, BENCHMARKS / "shared_prefix.py", "--case", name]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.mark.slow
def test_images_pass_through_the_tower_once_per_prompt_and_pass() -> None:
    """Three images; old and training pass of the policy, one of the reference."""
    counts = case("counts")
    assert {name: counts["trained tower"][name] for name in ("policy", "reference")} == {"policy": 6, "reference": 3}
    assert counts["frozen tower"]["policy"] == 3
    assert "reference" not in counts["frozen tower"]


@pytest.mark.slow
def test_micro_batches_are_even_on_a_realistic_mix() -> None:
    assert all(1 <= ratio <= 1.1 for ratio in case("balance").values())


@pytest.mark.slow
def test_both_sides_of_the_comparison_compute_the_same() -> None:
    assert case("gate")["agrees"]
