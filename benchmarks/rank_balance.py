"""What it gains that groups travel to the rank that trains them: `updates.balance_ranks` against each rank its own.

    OMP_NUM_THREADS=1 python benchmarks/rank_balance.py [--rounds 3] [--rollouts 4] [--out FILE]

By cost, for several numbers of ranks: rollouts of ragged lengths are dealt out both ways, and the share of the time
that ranks wait at micro-batches follows from the costs alone. By time, on two and four processes: the quick start
with scripted completions of the same kind of lengths; a round trains with each strategy both ways, one after the other,
and what is compared are the seconds from a sampled rollout to its last optimizer step, exchange and reference pass
included: by the clock, and as CPU time of the busiest rank between two points where ranks wait for each other, which is
what the step would take on cores that nobody else uses.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise, zip_longest
from pathlib import Path

import torch
from paired import Ratio, Result, machine, publish

from observe_r1.balancing import cost_of
from observe_r1.dealing import GroupWork, RankPlan, deal
from observe_r1.token_cost import TokenCost

PACKAGES = ("torch", "transformers", "lightning")
# a model of the size of Qwen2.5-VL-3B, its vision tower trained
THREE_BILLION = TokenCost(attention=5.3e-5, head=0.112, vision=0.229, vision_attention=3.7e-6)
SHAPES = ((2, 32, 8, 1, 4), (8, 128, 8, 1, 4), (8, 128, 8, 16, 1), (8, 512, 16, 4, 4), (64, 512, 16, 1, 4))
CASES = (("ddp", 2), ("fsdp2", 2), ("ddp", 4))  # strategy, ranks
SIGMA = 0.8  # of the logarithm of lengths

# beside the run, as a user's own file
SCRIPTED = f"""
import json, math, random, time
from pathlib import Path
import lightning as L
import torch
from observe_r1.experience import Completion
from observe_r1.rollout import RolloutEngine
from observe_r1.rewards.base import CorrectnessReward

class Lognormal(RolloutEngine):
    def generate(self, prompts, sampling, seed):
        return [self.group(prompt.prompt.position, sampling.group_size) for prompt in prompts]

    def group(self, position, size):
        generator = random.Random(position)
        lengths = [min(1000, 1 + int(generator.lognormvariate(math.log(100), {SIGMA}))) for _ in range(size)]
        return [Completion(torch.randint(20, 260, (length,)), torch.zeros(length), "") for length in lengths]

class EvenLength(CorrectnessReward):
    def judge_groups(self, groups):
        return [[len(completion) % 2 == 0 for completion in group.completions] for group in groups]

    def score(self, prompt, completion):
        raise NotImplementedError("judged by the group")

class Stamps(L.Callback):
    def __init__(self):
        self.rollouts, self.moved = [], 0

    def now(self):
        return [time.perf_counter(), time.process_time()]

    def on_rollout_start(self, trainer, module):
        self.rollouts.append([self.now()])

    def on_rollout_end(self, trainer, module, experience):
        self.moved += len(experience.received)
        self.rollouts[-1].append(self.now())

    def on_train_batch_end(self, *_):
        self.rollouts[-1].append(self.now())

    def on_train_end(self, trainer, module):
        noted = {{"rollouts": self.rollouts, "moved": self.moved}}
        Path(f"noted{{trainer.global_rank}}.json").write_text(json.dumps(noted))
"""


def sampled(prompts: int, size: int, seed: int) -> list[GroupWork]:
    """Lengths with a mean of 300, at most 8192; prompts of 200 to 1500 tokens, 70 % of them image."""
    generator = random.Random(seed)
    works = []
    for _ in range(prompts):
        tokens = generator.randint(200, 1500)
        lengths = [
            min(8192, 1 + int(generator.lognormvariate(math.log(300) - SIGMA**2 / 2, SIGMA))) for _ in range(size)
        ]
        patches = 4 * int(0.7 * tokens)
        works.append(
            GroupWork(
                THREE_BILLION.group(tokens, [patches], lengths),
                lengths,
                [True] * size,
                [True] * size,
                patches * 1176 * 4,  # float32 pixels of Qwen2.5-VL
            )
        )
    return works


def waited_for(ranks: Sequence[Sequence[GroupWork]], plans: Sequence[RankPlan]) -> tuple[float, float]:
    """Cost of the dearest micro-batches, which all ranks wait for, and of the mean ones; of one plan, or one each."""
    by_rank: list[list[list[float]]] = []  # [rank][step][micro-batch]
    for number, plan in enumerate(plans):
        planned = ranks if len(plans) == 1 else [ranks[number]]
        costs = [planned[rank][place].cost for rank, place in plan.owners]
        by_rank += [[[cost_of(costs, batch) for batch in step] for step in steps] for steps in plan.batches]
    rows = [row for steps in zip(*by_rank, strict=True) for row in zip_longest(*steps, fillvalue=0.0)]
    return sum(map(max, rows)), sum(map(statistics.fmean, rows))


def by_cost(world: int, prompts: int, size: int, steps: int, micro_batches: int) -> Result:
    waits, gains, megabytes = {"own": [], "balanced": []}, [], []
    for seed in range(5):
        works = sampled(prompts, size, seed)
        ranks = [works[rank::world] for rank in range(world)]
        plan = deal(ranks, steps, micro_batches)
        own = waited_for(ranks, [deal([works], steps, micro_batches) for works in ranks])
        balanced = waited_for(ranks, [plan])
        for name, (slowest, mean) in (("own", own), ("balanced", balanced)):
            waits[name].append(1 - mean / slowest)
        gains.append(own[0] / balanced[0])
        moved = [
            works[place] for rank in range(world) for g in plan.received(rank) for place in [number(plan, g, world)]
        ]
        megabytes.append(sum(work.prompt_bytes for work in moved) / world / 1e6)
    return {
        "ranks": world,
        "prompts": prompts,
        "group_size": size,
        "steps": steps,
        "micro_batches": micro_batches,
        "waiting_own": round(statistics.fmean(waits["own"]), 3),
        "waiting_balanced": round(statistics.fmean(waits["balanced"]), 3),
        "cost_ratio": round(statistics.fmean(gains), 3),
        "received_megabytes_per_rank": round(statistics.fmean(megabytes)),
    }


def number(plan: RankPlan, group: int, world: int) -> int:
    """Of a group of a plan, in the rollout that `works[rank::world]` dealt to ranks."""
    rank, place = plan.owners[group]
    return rank + place * world


def train(directory: Path, strategy: str, ranks: int, balanced: bool, rollouts: int, ladder: Path) -> Result:
    """Seconds per rollout of one training, without sampling."""
    directory.mkdir()
    (directory / "lognormal.py").write_text(SCRIPTED)
    options = [
        "--config=quickstart.yaml",
        "--trainer.accelerator=cpu",
        f"--trainer.devices={ranks}",
        f"--trainer.strategy={strategy}",
        "--trainer.accumulate_grad_batches=4",
        f"--trainer.max_steps={rollouts}",
        "--trainer.num_sanity_val_steps=0",
        "--trainer.limit_val_batches=0",
        "--trainer.enable_progress_bar=false",
        "--trainer.logger=false",
        "--trainer.callbacks=lognormal.Stamps",
        "--model.rollout=lognormal.Lognormal",
        "--model.rewards=null",
        "--model.rewards={even: lognormal.EvenLength}",
        f"--model.updates={{steps_per_rollout: 1, balance_ranks: {str(balanced).lower()}}}",
        "--data.prompts_per_rollout=16",
        f"--data.directory={ladder}",
    ]
    subprocess.run(
        [sys.executable, "-m", "observe_r1", "fit", *options], cwd=directory, check=True, capture_output=True
    )
    noted = [json.loads((directory / f"noted{rank}.json").read_text()) for rank in range(ranks)]
    wall, busy = [], []
    for stamps in zip(
        *(of_rank["rollouts"][1:] for of_rank in noted), strict=True
    ):  # the first has the self-check in it
        wall.append(stamps[0][-1][0] - stamps[0][0][0])
        cpu = [[later[1] - earlier[1] for earlier, later in pairwise(of_rank)] for of_rank in stamps]
        passes, micro_batches = [of_rank[0] for of_rank in cpu], [of_rank[1:] for of_rank in cpu]
        # DDP waits at the end of a step, sharded strategies in every micro-batch
        rows = [list(map(sum, micro_batches))] if strategy == "ddp" else list(zip(*micro_batches, strict=True))
        busy.append(max(passes) + sum(map(max, rows)))
    return {
        "wall_seconds": statistics.fmean(wall),
        "busy_seconds": statistics.fmean(busy),
        "moved": sum(of_rank["moved"] for of_rank in noted),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="0: by cost alone")
    parser.add_argument("--rollouts", type=int, default=4)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    lines = [{"benchmark": "rank_balance", **machine(torch.get_num_threads(), PACKAGES)}]
    lines += [{"by_cost": by_cost(*shape)} for shape in SHAPES]
    with tempfile.TemporaryDirectory() as scratch:
        rounds: list[dict[str, Result]] = []
        for count in range(arguments.rounds):
            results = {}
            for strategy, ranks in CASES:
                for way in ("own", "balanced"):
                    name = f"{strategy}_{ranks}_{way}"
                    results[name] = train(
                        Path(scratch) / f"{count}-{name}",
                        strategy,
                        ranks,
                        way == "balanced",
                        arguments.rollouts,
                        Path(scratch) / "ladder",
                    )
            rounds.append(results)
            lines.append({"round": results})
    for strategy, ranks in CASES if rounds else ():
        for kind in ("busy", "wall"):
            own, balanced = (
                [results[f"{strategy}_{ranks}_{way}"][f"{kind}_seconds"] for results in rounds]
                for way in ("own", "balanced")
            )
            ratios = [a / b for a, b in zip(own, balanced, strict=True)]
            name = f"own / balanced, {kind} seconds per rollout without sampling, {strategy} on {ranks} ranks"
            lines.append(Ratio(name, ratios, 1.0).to_document())
    publish(lines, arguments.out)


if __name__ == "__main__":
    main()
