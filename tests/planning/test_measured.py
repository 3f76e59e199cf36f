"""The plan's peaks against those of real runs, measured in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from measured import CASES, config_of

from observe_r1.peak_memory import PeakMemory
from observe_r1.planning.devices import Device
from observe_r1.planning.memory import SAMPLING, TRAINING, UPDATE
from observe_r1.planning.plan import make_plan

HERE = Path(__file__).parent
TOLERANCE = 0.15
UNCERTAIN = 24 * 2**20  # bytes that a process takes or not beside tensors: stacks of threads, pages of code, the heap

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PeakMemory.is_measured("cpu"), reason="this machine does not tell the peak"),
]


@pytest.mark.parametrize("name", CASES)
def test_a_plan_is_what_a_run_takes(name: str) -> None:
    case = CASES[name]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(HERE.parent.parent / "benchmarks"),
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0",
        # what is freed goes back to the system at once, so that the process has what its tensors have
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "0",
    }
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "measured.py"), name],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    measured = json.loads(finished.stdout.splitlines()[-1])
    with config_of(case) as setup:
        plan = make_plan(setup, Device("cpu", "cpu", 2**34, 1e11, 1e11, 1e10), case.plan)
    planned = {phase.name: phase.total for phase in plan.memory.phases}
    training = max(planned[TRAINING], planned[UPDATE])
    print(
        f"{name}: training {training:,} planned, {measured['training']:,} measured; sampling {planned[SAMPLING]:,} "
        f"planned, {measured['sampling']:,} measured"
    )
    assert training == pytest.approx(measured["training"], rel=TOLERANCE)
    assert planned[SAMPLING] == pytest.approx(measured["sampling"], rel=TOLERANCE, abs=UNCERTAIN)
