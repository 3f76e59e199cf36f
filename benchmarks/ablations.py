"""Does the recipe learn faster than plain GRPO on the quick-start ladder? Runs every ablation with several seeds.

    python benchmarks/ablations.py RUNS [--seeds 0 1 2] [--parallel 2] [--set trainer.max_epochs=2 ...]

Writes `ablations.json` (every validation of every run), `ablations.png` (the curves) and prints a table. Runs that are
finished are not run again, so it can be interrupted. All runs share one ladder and, per seed, the same policy and seed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

VARIANTS = {
    "recipe": [],
    "plain GRPO": ["ablations/plain_grpo.yaml"],
    "no bonus": ["ablations/no_bonus.yaml"],
    "no dynamic weight": ["ablations/no_dynamic_weight.yaml"],
    "random order": ["ablations/random_order.yaml"],
}


def command(variant: str, seed: int, settings: list[str]) -> list[str]:
    """The run as a user would start it."""
    configs = [f"--config={config}" for config in ["quickstart.yaml", *VARIANTS[variant]]]
    return [
        *(sys.executable, "-m", "observe_r1", "fit", *configs, f"--seed_everything={seed}"),
        "--trainer.enable_progress_bar=false",
        *(f"--{setting}" for setting in settings),
    ]


def run(runs: Path, variant: str, seed: int, settings: list[str]) -> dict[str, Any]:
    """The summary of a run, which is made unless it is there."""
    directory = runs / f"{variant.replace(' ', '_')}-{seed}"
    done = sorted(directory.glob("**/summary.json"))
    if not done or json.loads(done[-1].read_text())["status"] != "finished":
        directory.mkdir(parents=True, exist_ok=True)
        shared = f"--data.directory={(runs / 'ladder').resolve()}"
        with (directory / "log.txt").open("w") as log:
            subprocess.run(
                [*command(variant, seed, settings), shared],
                cwd=directory,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
                check=True,
            )
        done = sorted(directory.glob("**/summary.json"))
    summary: dict[str, Any] = json.loads(done[-1].read_text())
    return summary


def draw(results: dict[str, dict[int, dict[str, Any]]], path: Path) -> None:
    """Held-out pass rate over optimizer steps: the mean of the seeds, and each seed faintly."""
    figure = Figure(figsize=(8, 5), dpi=110, layout="constrained")
    axes = figure.subplots()
    for number, (variant, by_seed) in enumerate(results.items()):
        curves = [[(v["step"], v["pass_rate"]) for v in summary["validations"]] for summary in by_seed.values()]
        for curve in curves:
            axes.plot(*zip(*curve, strict=True), color=f"C{number}", alpha=0.2, linewidth=1)
        steps = [step for step, _ in curves[0]]
        means = [statistics.fmean(curve[i][1] for curve in curves) for i in range(len(steps))]
        axes.plot(steps, means, color=f"C{number}", label=variant, linewidth=2)
    axes.set(xlabel="optimizer steps", ylabel="greedy pass rate on held-out questions")
    axes.set_title(f"Quick-start ladder, mean of {len(next(iter(results.values())))} seeds")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="directory of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--parallel", type=int, default=1, help="runs at the same time, with one thread each")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of every run")
    arguments = parser.parse_args()
    jobs = [(variant, seed) for seed in arguments.seeds for variant in arguments.variants]
    run(arguments.runs, *jobs[0], arguments.set)  # makes the ladder that the others share
    with ThreadPoolExecutor(arguments.parallel) as pool:
        summaries = list(pool.map(lambda job: run(arguments.runs, *job, arguments.set), jobs))
    results: dict[str, dict[int, dict[str, Any]]] = {variant: {} for variant in arguments.variants}
    for (variant, seed), summary in zip(jobs, summaries, strict=True):
        results[variant][seed] = summary
    (arguments.runs / "ablations.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, arguments.runs / "ablations.png")
    columns = ("variant", "before", "after", "gain by seed", "mean gain", "minutes")
    table = Table(*columns, title="Greedy held-out pass rate")
    for variant, by_seed in results.items():
        rates = [summary["pass_rate"] for summary in by_seed.values()]
        gains = [100 * (rate["after"] - rate["before"]) for rate in rates]
        table.add_row(
            variant,
            f"{statistics.fmean(rate['before'] for rate in rates):.3f}",
            f"{statistics.fmean(rate['after'] for rate in rates):.3f}",
            " ".join(f"{gain:+.1f}" for gain in gains),
            f"{statistics.fmean(gains):+.1f}",
            f"{statistics.fmean(summary['seconds']['total'] for summary in by_seed.values()) / 60:.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
