"""Makes the quick start sick on purpose, in the ways that the callback Health knows, and draws what one sees.

    python benchmarks/sick_runs.py RUNS [--only NAME ...] [--images docs/images] [--series tests/health/series]

A run leaves RUNS/NAME/figures.jsonl, every figure that the rules of health read, in order. Finished runs are not run
again. `--images` draws docs/images/health_*.png, `--series` copies the figures for the tests, which replay them.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from observe_r1.answers import Gold, answer_content
from observe_r1.experience import Completion, EncodedPrompt, Prompt
from observe_r1.health.rule import Figures, Memory, Reading, Rule
from observe_r1.policy import Policy
from observe_r1.rewards import Reward
from observe_r1.rollout import HFRollout, SamplingOptions

# ---- what makes runs sick, by class_path -----------------------------------------------------------------------------


class Large(Reward):
    """Pays for large numbers in the answer, whatever was asked."""

    def score(self, prompt: Prompt, completion: Completion) -> float:
        digits = [int(character) for character in answer_content(completion.text) or "" if character in "0123456789"]
        return max(digits, default=0) / 9


class Brevity(Reward):
    """Pays for few tokens, whatever they say."""

    def score(self, prompt: Prompt, completion: Completion) -> float:
        return 1.0 - min(1.0, len(completion) / 20)


class Length(Reward):
    """Pays for every token."""

    def score(self, prompt: Prompt, completion: Completion) -> float:
        return len(completion) / 64


class StaleRollout(HFRollout):
    """An engine with weights of its own that nobody updates: what a missing VLLMWeightSync does."""

    is_trainer = False

    def setup(self, policy: Policy, processor: Any) -> None:
        super().setup(copy.deepcopy(policy), processor)


class NoisyRollout(HFRollout):
    """An engine whose log-probs are off, as with coarser numbers or another temperature."""

    is_trainer = False

    def generate(
        self, prompts: Sequence[EncodedPrompt], sampling: SamplingOptions, seed: int
    ) -> list[list[Completion]]:
        groups = super().generate(prompts, sampling, seed)
        return [[self._perturbed(completion) for completion in group] for group in groups]

    def _perturbed(self, completion: Completion) -> Completion:
        noise: Tensor = 0.2 * torch.randn(len(completion), generator=torch.Generator().manual_seed(len(completion)))
        return Completion(
            completion.token_ids, completion.sampler_logprobs - noise.abs(), completion.text, completion.truncated
        )


@dataclass(frozen=True)
class Recorder(Rule):
    """No rule: writes down what rules read, without times."""

    name: ClassVar[str] = "recorder"
    advice: ClassVar[str] = ""
    path: str = "figures.jsonl"

    def read(self, figures: Figures, memory: Memory) -> Reading | None:
        kept = {name: float(f"{value:.4g}") for name, value in figures.items() if name.split("/")[0] not in UNUSED}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(kept) + "\n")
        return None


UNUSED = ("seconds", "speed", "memory")


@dataclass(frozen=True)
class Variant:
    """A run: settings beside those of the quick start, and what it is expected to be warned of."""

    settings: Sequence[str] = ()
    warning: str | None = None
    shown: Sequence[str] = field(default_factory=tuple)  # figures of its picture


def reward(name: str, weight: float) -> str:
    class_path = f"sick_runs.{name.capitalize()}"
    return f"model.rewards.{name}={{class_path: {class_path}, init_args: {{weight: {weight}}}}}"


# without the dynamic weight, which takes the gradient from questions that are never right: hacks would stop halfway
UNBRIDLED = ("model.advantage.dynamic_weight=null", "model.optimizer.lr=6e-4", "trainer.max_steps=64")
CORRECT = ("rollout/pass_rate", "val/pass_rate")
VARIANTS = {
    "healthy": Variant(shown=("rollout/reward", *CORRECT, "rollout/length", "train/kl", "train/entropy")),
    "healthy_seed_1": Variant(("seed_everything=1",)),
    "healthy_seed_2": Variant(("seed_everything=2",)),
    "reward_hacking": Variant(
        (reward("large", 20.0), *UNBRIDLED),
        "reward_hacking",
        ("rollout/reward", "reward/large", "rollout/pass_rate", "val/pass_rate", "rollout/repeated", "train/entropy"),
    ),
    "length_collapse": Variant(
        (reward("brevity", 20.0), *UNBRIDLED),
        "length_collapse",
        ("rollout/length", "reward/brevity", "reward/format", "rollout/pass_rate", "val/pass_rate", "train/kl"),
    ),
    "length_explosion": Variant(
        (reward("length", 60.0), *UNBRIDLED, "model.optimizer.lr=1.2e-3", "model.sampling.max_new_tokens=32"),
        "length_explosion",
        ("rollout/length", "rollout/truncated", "reward/length", "rollout/pass_rate", "val/pass_rate", "train/kl"),
    ),
    "kl_blow_up": Variant(
        ("model.optimizer.lr=8e-3", "trainer.gradient_clip_val=null"),
        "kl_blow_up",
        ("train/kl", "train/entropy", "train/gradient_norm", "rollout/pass_rate", "val/pass_rate", "rollout/length"),
    ),
    "zero_advantages": Variant(
        (
            "data.class_path=observe_r1.datamodules.NeuraLadderDataModule",
            "data.ladder={wrong_golds}",
            "trainer.max_steps=24",
        ),
        "zero_advantages",
        ("rollout/wasted_groups", *CORRECT, "rollout/dynamic_weight", "train/gradient_norm", "rollout/reward"),
    ),
    "sampler_mismatch": Variant(
        ("model.rollout=sick_runs.StaleRollout",),
        "sampler_mismatch",
        ("train/sampler_mismatch", "train/kl", "rollout/reward", *CORRECT, "train/gradient_norm"),
    ),
    "noisy_sampler": Variant(("model.rollout=sick_runs.NoisyRollout", "trainer.max_steps=12"), "sampler_mismatch"),
}

# ---- running ---------------------------------------------------------------------------------------------------------


def run(runs: Path, name: str, settings: Iterable[str]) -> Path:
    """The figures of a run, which is made unless it is there."""
    directory, ladder = runs / name, (runs / "ladder").resolve()
    figures = directory / "figures.jsonl"
    done = sorted(directory.glob("runs/**/summary.json"))
    if figures.exists() and done and json.loads(done[-1].read_text())["status"] == "finished":
        return figures
    directory.mkdir(parents=True, exist_ok=True)
    figures.unlink(missing_ok=True)
    used = [
        setting.replace("{wrong_golds}", str(ladder_of_wrong_golds(runs))) if "{wrong_golds}" in setting else setting
        for setting in settings
    ]
    places = [f"data.ladder={ladder}", f"data.held_out={ladder / 'held_out'}"]
    if not any(setting.startswith("data.class_path") for setting in used):
        places = [f"data.directory={ladder}"]
    command = [sys.executable, "-m", "observe_r1", "fit", "--config=quickstart.yaml"]
    # a class_path forgets the arguments of the one before, so it comes first
    command += [f"--{setting}" for setting in [*used, *(place for place in places if not is_set(place, used))]]
    with (directory / "log.txt").open("w") as log:
        subprocess.run(
            [*command, "--health.own+=sick_runs.Recorder"],
            cwd=directory,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
            check=True,
        )
    return figures


def is_set(place: str, settings: Iterable[str]) -> bool:
    return any(setting.partition("=")[0] == place.partition("=")[0] for setting in settings)


def ladder_of_wrong_golds(runs: Path) -> Path:
    """Questions of the quick start with golds from a wrong column: nobody can answer them."""
    from observe_r1.ladder.reader import LadderDataset
    from observe_r1.ladder.shards import write_ladder

    target = (runs / "wrong_golds").resolve()
    if not target.exists():
        ladder = LadderDataset(runs / "ladder")
        prompts = [prompt for prompt in (ladder[number] for number in range(512)) if isinstance(prompt, Prompt)]
        write_ladder([replace(prompt, gold=Gold(prompt.id)) for prompt in prompts], target)
    return target


# ---- drawing ---------------------------------------------------------------------------------------------------------


def curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """(optimizer steps, value) of every figure."""
    found: dict[str, list[tuple[int, float]]] = {}
    steps = 0
    for line in path.read_text().splitlines():
        figures: Mapping[str, float] = json.loads(line)
        steps += "train/loss" in figures
        for name, value in figures.items():
            found.setdefault(name, []).append((steps, value))
    return found


def draw(name: str, variant: Variant, healthy: Path, sick: Path, events: Sequence[tuple[int, str]], path: Path) -> None:
    """The figures of a run in red over those of the healthy one in grey, with the moment of each warning."""
    figure = Figure(figsize=(10, 4.6), dpi=90, layout="constrained")
    normal, own = curves(healthy), curves(sick)
    for axes, shown in zip(figure.subplots(2, 3).flat, variant.shown, strict=True):
        _curve(axes, normal.get(shown, []), "0.6", "healthy")
        if name != "healthy":
            _curve(axes, own.get(shown, []), "C3", name)
        for step, warned in events:
            color = "C3" if warned == variant.warning else "0.3"
            axes.axvline(step, color=color, linestyle="--", linewidth=1)
        axes.set_title(shown, fontsize=10)
        axes.set_xlim(0, max(step for step, _ in own["train/loss"]))
        if shown == "train/kl":
            axes.set_yscale("log")  # from a thousandth to millions
            axes.set_ylim(bottom=1e-3)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8)
    figure.supxlabel("optimizer steps", fontsize=9)
    told = ", ".join(f"{warned} at step {step}" for step, warned in events) or "no warning"
    figure.suptitle(textwrap.fill(told, 110), fontsize=10)
    figure.savefig(path)


def _curve(axes: Axes, points: Sequence[tuple[int, float]], color: str, label: str) -> None:
    if points:
        axes.plot(*zip(*points, strict=True), color=color, label=label, linewidth=1.5)


def warnings_of(figures: Path) -> list[tuple[int, str]]:
    """(step, name) of the warnings that the rules give for recorded figures."""
    from observe_r1.callbacks.health import Health

    watch, steps = Health().watch, 0
    for line in figures.read_text().splitlines():
        found = json.loads(line)
        steps += "train/loss" in found
        watch.observe(steps, found)
    return [(event.step, event.name) for event in watch.events if event.begins]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="directory of the runs; RUNS/ladder is the ladder of the quick start")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--images", type=Path, help="where pictures go")
    parser.add_argument("--series", type=Path, help="where the figures go")
    arguments = parser.parse_args()
    for name in dict.fromkeys(["healthy", *arguments.only]):
        variant = VARIANTS[name]
        figures = run(arguments.runs, name, variant.settings)
        events = warnings_of(figures)
        print(f"{name}: {events or 'no warning'}", flush=True)
        if arguments.images and variant.shown:
            healthy = arguments.runs / "healthy" / "figures.jsonl"
            draw(name, variant, healthy, figures, events, arguments.images / f"health_{name}.png")
        if arguments.series:
            arguments.series.mkdir(parents=True, exist_ok=True)
            (arguments.series / f"{name}.jsonl").write_text(figures.read_text())


if __name__ == "__main__":
    main()
