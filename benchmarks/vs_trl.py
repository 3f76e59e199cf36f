"""A whole GRPO step and its rollout, observe_r1 against TRL's GRPOTrainer, on one random vision-language model.

    python benchmarks/vs_trl.py [--rounds 3] [--json]                    # all cases, alternately, as processes
    python benchmarks/vs_trl.py --case ours|trl|trl_completion_only      # one case, one JSON object
    python benchmarks/vs_trl.py --case check                             # do both sides compute the same?

Needs the extra `bench`. One step: 3 prompts with a 448 px image each, 8 completions of 64 tokens, reference model, one
AdamW step, vision tower trained, no gradient checkpointing, float32 on the CPU. Exits with 1 when the two sides do not
compute the same, or a ratio misses its target.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from our_side import Workload, run_ours
from paired import Ratio, Result, machine, paired_ratio, run_case, run_rounds
from rich.console import Console
from rich.table import Table

CASES = ("ours", "trl", "trl_completion_only")
PACKAGES = ("torch", "transformers", "lightning", "trl", "accelerate")
PARTS = ("step", "generate", "reference", "train", "other", "step_cpu")


def run_here(case: str, workload: Workload) -> Result:
    """Runs one case in this process."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        workload.save_policy(directory)
        if case == "ours":
            return run_ours(workload, directory)
        from trl_side import check, run_trl  # TRL's import costs memory that our case must not be charged with

        if case == "check":
            return check(workload, directory)
        return run_trl(case, workload, directory)


def ratios(rounds: Sequence[dict[str, Result]]) -> list[Ratio]:
    """What is promised."""

    def seconds(part: str) -> Any:
        return lambda result: result["seconds"][part]

    return [
        paired_ratio("step, TRL at completions only", rounds, "trl_completion_only", "ours", seconds("step"), 2.5),
        paired_ratio("step, TRL as it is on a CPU", rounds, "trl", "ours", seconds("step"), 3.0),
        paired_ratio("rollout", rounds, "trl", "ours", seconds("generate"), 1.5),
    ]


def show(checked: Result, rounds: Sequence[dict[str, Result]], measured: Sequence[Ratio], where: Result) -> None:
    """Tables for people."""
    console = Console()
    table = Table("seconds per step", *CASES, title="Medians over rounds")
    for part in PARTS:
        medians = (statistics.median(results[case]["seconds"][part] for results in rounds) for case in CASES)
        table.add_row(part, *(f"{value:.2f}" for value in medians))
    peaks = (statistics.median(results[case]["peak_mib"] for results in rounds) for case in CASES)
    table.add_row("peak of the process, MiB", *(f"{value:,.0f}" for value in peaks))
    console.print(table)
    names = sorted({name for case in CASES for name in rounds[0][case]["counts"]})
    table = Table("passes per step", *CASES, title="What went through the model")
    for name in names:
        table.add_row(name, *(f"{rounds[0][case]['counts'].get(name, 0):,.0f}" for case in CASES))
    console.print(table)
    table = Table("ratio TRL / observe_r1", "median", "by round", "target", "", title="Paired ratios")
    for ratio in measured:
        by_round = " ".join(f"{value:.2f}" for value in ratio.rounds)
        verdict = "reached" if ratio.reached else "missed"
        table.add_row(ratio.name, f"{ratio.median:.2f}", by_round, f"{ratio.target}", verdict)
    console.print(table)
    worst = [max(checked[case][kind] for case in CASES[1:]) for kind in ("logprob", "gradient")]
    console.print(f"same tokens: log-probs differ by {worst[0]:.1e}, gradients by {worst[1]:.1e} of the largest")
    console.print(", ".join(f"{name} {value}" for name, value in where.items()))


def compare(workload: Workload, rounds: int, threads: int, as_json: bool) -> bool:
    """Checks, measures and prints; whether every target is reached."""
    options = [f"--steps={workload.steps}", f"--warm-up={workload.warm_up}", f"--threads={threads}"]
    options.append(f"--trl-micro-batches={workload.trl_micro_batches}")
    commands = {case: [sys.executable, __file__, f"--case={case}", *options] for case in ("check", *CASES)}

    def note(result: Result) -> None:
        if as_json:
            print(json.dumps(result), flush=True)

    where = machine(threads, PACKAGES)
    note({"machine": where})
    checked = run_case(commands.pop("check"), threads)
    note(checked)
    if not checked["passed"]:
        Console(stderr=True).print("observe_r1 and TRL do not compute the same, nothing was timed:", checked)
        return False
    done: list[dict[str, Result]] = []
    for results in run_rounds(commands, rounds, threads):
        done.append(results)
        for result in results.values():
            note({"round": len(done), **result})
    measured = ratios(done)
    for ratio in measured:
        note(ratio.to_document())
    if not as_json:
        show(checked, done, measured, where)
    return all(ratio.reached for ratio in measured)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=["check", *CASES], help="run this case here and print its JSON object")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=Workload.steps, help="timed steps of each run")
    parser.add_argument("--warm-up", type=int, default=Workload.warm_up, help="steps of each run before those")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trl-micro-batches", type=int, default=1, help="of TRL's optimizer step; observe_r1 has one")
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of tables")
    arguments = parser.parse_args()
    workload = Workload(warm_up=arguments.warm_up, steps=arguments.steps, trl_micro_batches=arguments.trl_micro_batches)
    if arguments.case is None:
        sys.exit(0 if compare(workload, arguments.rounds, arguments.threads, arguments.json) else 1)
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    with contextlib.redirect_stdout(sys.stderr):
        result = run_here(arguments.case, workload)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
