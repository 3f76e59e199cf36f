"""Names that nobody knows: options, keys, classes, commands, files of configuration."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from mistake import MINE, Mistake, config

MISTAKES = [
    Mistake(
        "option", ("--model.polcy.pretrained=x",), ("model.polcy", "Did you mean model.policy.pretrained?"), code=2
    ),
    Mistake(
        "key",
        MINE,
        ("'model.sampling.group_sise'", "Did you mean model.sampling.group_size?"),
        config(model={"sampling": {"group_sise": 4}}),
        code=2,
    ),
    Mistake(
        "key of nothing near",
        MINE,
        ("'model.sampling.nucleus'", "model.sampling takes group_size, max_new_tokens, temperature, top_p."),
        config(model={"sampling": {"nucleus": 4}}),
        code=2,
    ),
    Mistake("section", MINE, ("'modell.seed'", "Did you mean model"), config(modell={"seed": 4}), code=2),
    Mistake(
        "argument of a class",
        MINE,
        ("NeuraLadderDataModule", "'laddr'", "Did you mean ladder?"),
        config(data={"class_path": "observe_r1.datamodules.NeuraLadderDataModule", "init_args": {"laddr": "x"}}),
        code=2,
    ),
    Mistake(
        "reward",
        ("--model.rewards.x=observe_r1.rewards.FormatRewards",),
        ("model.rewards", "FormatRewards", "Did you mean observe_r1.rewards.FormatReward?"),
        code=2,
    ),
    Mistake(
        "callback",
        ("--trainer.callbacks+=observe_r1.callbacks.RewardLoger",),
        ("RewardLoger", "Did you mean observe_r1.callbacks.RewardLogger?"),
        code=2,
    ),
    Mistake(
        "logger", ("--trainer.logger=WanddbLogger",), ("Did you mean lightning.pytorch.loggers.WandbLogger?",), code=2
    ),
    Mistake(
        "benchmark",
        (
            "--trainer.callbacks+=observe_r1.callbacks.BenchmarkEvaluation",
            "--trainer.callbacks.benchmarks=[observe_r1.evaluation.MathVissta]",
        ),
        ("MathVissta", "Did you mean observe_r1.evaluation.MathVista?"),
        command="validate",
        code=2,
    ),
    Mistake(
        "module", ("--model.rewards.x=mine.Mine",), ("No module named 'mine'", "{directory}", "Put mine.py"), code=2
    ),
    Mistake("command", ("fti",), ("'fti'", "Did you mean fit?", "ladder, audit"), on_its_own=True),
    Mistake("config", ("fit", "--config=nowhere.yaml"), ("nowhere.yaml", "quickstart.yaml"), code=2, on_its_own=True),
    Mistake(
        "ending of a config",
        ("fit", "--config=quickstart.yml"),
        ("Did you mean quickstart.yaml?",),
        code=2,
        on_its_own=True,
    ),
    Mistake("bare config", ("fit", "quickstart.yaml"), ("--config quickstart.yaml",), code=2, on_its_own=True),
    Mistake(
        "option of another class",
        ("fit", "--config=quickstart.yaml", "--data.ladder={ladder}"),
        ("'ladder' is not accepted", "--data.class_path observe_r1.datamodules.NeuraLadderDataModule before it"),
        code=2,
        on_its_own=True,
    ),
    Mistake("no command", (), ("name a command: fit, ", "fit --config quickstart.yaml"), on_its_own=True),
    Mistake(
        "no config of a build",
        ("ladder", "build", "--sources={ladder}", "--output=x"),
        ("rollouts.policy.pretrained", "--config ladder/build.yaml"),
        code=2,
        on_its_own=True,
    ),
    Mistake("no config", ("fit",), ("model.policy.pretrained", "--config quickstart.yaml"), code=2, on_its_own=True),
    Mistake("no ladder", (), ("required", "Give --data.ladder"), code=2),
    Mistake("strategy", ("--trainer.strategy=fsdp3",), ("fsdp3", "fsdp2", "deepspeed_zero2")),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_is_named(mistake: Mistake, told: Callable[[Mistake], None]) -> None:
    told(mistake)
