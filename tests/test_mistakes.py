"""What a user is told about a mistake: the value, what may stand there, and what to do, in a few lines.

The command line is the real one, up to the error. Every row is a mistake, the files around it, the command, and the
words that have to be in the answer.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch

LINES = 12  # of an error, at most; a message may be long, a traceback always is
SHORT = (
    "--config=quickstart.yaml",
    "--trainer.accelerator=cpu",
    "--trainer.enable_model_summary=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.limit_val_batches=0",
    "--trainer.max_steps=1",
    "--trainer.callbacks=[]",
    "--model.sampling={group_size: 4, max_new_tokens: 12}",
    "--model.updates.steps_per_rollout=1",
    "--data.class_path=observe_r1.datamodules.NeuraLadderDataModule",
    "--data.prompts_per_rollout=8",
    "--data.workers=0",
)
REWARD = (
    "from observe_r1.rewards import Reward\nclass Mine(Reward):\n    def score(self, prompt, completion):\n        "
)


class ForkingCommandLine:
    """`observe-r1`, started once and forked for every command."""

    def __init__(self, directory: Path) -> None:
        self.output = directory / "output"
        program = Path(__file__).with_name("forking_command_line.py")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __call__(self, directory: Path, arguments: list[str], environment: Mapping[str, str]) -> tuple[int, str]:
        request = {
            "directory": str(directory),
            "output": str(self.output),
            "arguments": arguments,
            "environment": environment,
        }
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline()), self.output.read_text()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(10)


@pytest.fixture(scope="module")
def forking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkingCommandLine]:
    command_line = ForkingCommandLine(tmp_path_factory.mktemp("forking"))
    yield command_line
    command_line.close()


@dataclass(frozen=True)
class World:
    """What mistakes are made with."""

    directory: Path
    ladder: Path
    other_ladder: Path
    checkpoint: Path


Prepare = Callable[[World], object]


@dataclass(frozen=True)
class Mistake:
    name: str
    arguments: tuple[str, ...]
    expected: tuple[str, ...]
    prepare: Prepare = lambda world: None
    command: str = "fit"
    code: int = 1
    environment: dict[str, str] = field(default_factory=dict)
    on_its_own: bool = False  # the arguments are all there are
    absent: str = ""  # a package without which it is a mistake


def file(name: str, text: str) -> Prepare:
    return lambda world: (world.directory / name).write_text(text)


def config(**content: Any) -> Prepare:
    return file("mine.yaml", json.dumps(content))  # JSON is YAML


def changed_ladder(change: Callable[[Path], object]) -> Prepare:
    return lambda world: change(Path(copytree(world.ladder, world.directory / "ladder")))


def changed_checkpoint(change: Callable[[dict[str, Any]], object]) -> Prepare:
    def prepare(world: World) -> None:
        content = torch.load(world.checkpoint, weights_only=True)
        change(content)
        torch.save(content, world.directory / "changed.ckpt")

    return prepare


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def model_without(*patterns: str) -> Prepare:
    def prepare(world: World) -> None:
        import observe_r1.quickstart

        copy = world.directory / "model"
        copytree(Path(observe_r1.quickstart.__path__[0]) / "policy", copy)
        for pattern in patterns:
            for path in copy.glob(pattern):
                path.unlink()

    return prepare


MINE = ("--config=mine.yaml",)
OWN = ("--model.rewards.odd=mine.Mine",)
RESUME = ("--trainer.max_steps=2", "--ckpt_path={checkpoint}")

WRONG_NAMES = [
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
    Mistake("no config", ("fit",), ("model.policy.pretrained", "--config quickstart.yaml"), code=2, on_its_own=True),
    Mistake("no ladder", (), ("required", "ladder"), code=2),
    Mistake("strategy", ("--trainer.strategy=fsdp3",), ("fsdp3", "fsdp2", "deepspeed_zero2")),
]

WRONG_VALUES = [
    Mistake("yaml", MINE, ("line 2", "mine.yaml"), file("mine.yaml", "model:\n  sampling: {group_size: 4\n"), code=2),
    Mistake("word for a number", ("--model.sampling.group_size=four",), ("an int", "four"), code=2),
    Mistake("word for a list", ("--model.policy.freeze='*visual*'",), ("list", "visual", "[first, second]"), code=2),
    Mistake("choice", ("--model.objective.name=ppo",), ("ppo", "'grpo'", "'dr_grpo'"), code=2),
    Mistake("precision", ("--trainer.precision=fp16",), ("fp16", "'16-true'", "'bf16-mixed'"), code=2),
    *(
        Mistake(f"{option}={value}", (f"--{option}={value}",), expected)
        for option, value, *expected in (
            ("model.sampling.group_size", 0, "group_size is 0", "at least 1"),
            ("model.sampling.max_new_tokens", -1, "max_new_tokens is -1", "at least 1"),
            ("model.sampling.temperature", -1, "temperature is -1.0", "0 for greedy"),
            ("model.sampling.top_p", 0, "top_p is 0.0", "(0, 1]"),
            ("model.kl.coefficient", -1, "coefficient is -1.0", "0 for no KL"),
            ("model.advantage.bonus", -1, "bonus is -1.0", "0 for none"),
            ("model.updates.steps_per_rollout", 0, "steps_per_rollout is 0", "at least 1"),
            ("model.policy.logprob_chunk_tokens", 0, "logprob_chunk_tokens is 0", "1 or more"),
            ("model.prompt.max_pixels", -5, "max_pixels is -5", "or null"),
            ("model.objective.epsilon_low", -1, "epsilon_low", "≥ 0"),
            ("data.prompts_per_rollout", 0, "data.prompts_per_rollout is 0", "at least 1"),
            ("data.workers", -1, "data.workers is -1", "at least 0"),
            ("data.questions_per_batch", 0, "data.questions_per_batch is 0", "at least 1"),
            ("data.max_image_pixels", 0, "data.max_image_pixels is 0", "at least 1"),
        )
    ),
]

DO_NOT_FIT = [
    Mistake("group of one", ("--model.sampling.group_size=1",), ("group_size is 1", "Use 2 or more")),
    Mistake(
        "too many micro-batches",
        ("--trainer.accumulate_grad_batches=100",),
        ("32 completions", "8 prompts × 4", "accumulate_grad_batches (100)", "smaller"),
    ),
    Mistake(
        "answers too long", ("--model.sampling.max_new_tokens=100000",), ("is 100000", "1024 positions", "use less")
    ),
    Mistake("dr_grpo", ("--model.objective.name=dr_grpo",), ("dr_grpo", "set it to max_new_tokens")),
    Mistake("no gpu", ("--trainer.accelerator=gpu",), ("gpu", "--trainer.accelerator cpu", "torch")),
    Mistake("too many gpus", ("--trainer.accelerator=cuda", "--trainer.devices=2"), ("['cpu']", "fewer")),
    Mistake("fsdp", ("--trainer.strategy=fsdp",), ("`fsdp`", "fsdp2")),
    Mistake(
        "two judges", ("--model.rewards.b=observe_r1.rewards.AccuracyReward",), ("2 decide", "AccuracyReward` once")
    ),
    Mistake(
        "no judge",
        MINE,
        ("0 decide", "AccuracyReward` once"),
        config(model={"rewards": {"f": "observe_r1.rewards.FormatReward"}}),
    ),
    Mistake("questions for test", (), ("`test` needs data.held_out",), command="test"),
    Mistake("questions for predict", (), ("`predict` needs data.held_out",), command="predict"),
    Mistake("nothing to train", ("--model.policy.freeze=['*']",), ("policy.freeze", "no parameter", "policy.lora")),
    Mistake("freeze", ("--model.policy.freeze=['*vision*']",), ("'*vision*'", "model.visual.blocks.*")),
    Mistake("learning rate", ("--model.learning_rates={{'*vison*': 1e-5}}",), ("'*vison*'", "model.visual.blocks.*")),
    Mistake(
        "adapters",
        ("--model.policy.lora={{rank: 4, target_modules: [q_proj, qproj]}}",),
        ("target_modules", "called qproj", "q_proj", "[all-linear]"),
    ),
    Mistake("rank of adapters", ("--model.policy.lora={{rank: 0}}",), ("policy.lora.rank is 0", "1 or more")),
    Mistake("attention", ("--model.policy.attn_implementation=flash",), ("flash", "sdpa")),
    Mistake("attention of prefixes", ("--model.policy.prefix_attention=flash_attn",), ("CUDA", "Choose one of auto")),
]

NOT_THERE = [
    Mistake(
        "ladder", ("--data.ladder=nowhere",), ("data.ladder: nowhere", "no such path in {directory}", "ladder.json")
    ),
    Mistake("held_out", ("--data.held_out=nowhere", "--trainer.limit_val_batches=1"), ("data.held_out: nowhere",)),
    Mistake(
        "rows, no ladder", ("--data.ladder=my.jsonl",), ("observe-r1 ladder import my.jsonl",), file("my.jsonl", "{}")
    ),
    Mistake("no shards", ("--data.ladder=.",), ("holds no shards", "ladder.json")),
    Mistake(
        "manifest",
        ("--data.ladder=.",),
        ("ladder.json is not a usable", "build the ladder again"),
        file("ladder.json", "{"),
    ),
    Mistake("empty shard", ("--data.ladder=.",), ("0 samples", "ladder inspect"), file("a.tar", "")),
    Mistake(
        "shard gone",
        ("--data.ladder=ladder",),
        ("shard-000001.tar is missing", "restore", "missing_shards to skip"),
        changed_ladder(lambda ladder: (ladder / "shard-000001.tar").unlink()),
    ),
    Mistake(
        "server of the ladder",
        ("--data.ladder=http://127.0.0.1:9/l", "--data.remote={{attempts: 1}}"),
        ("http://127.0.0.1:9/l", "Cannot connect"),
    ),
    Mistake("protocol", ("--data.ladder=foo://x/l",), ("foo://x/l", "https://", "s3fs")),
    Mistake("prompts", ("--model.prompt.max_prompt_tokens=10",), ("24 × prompt_too_long", "tokens is 10", "raise it")),
    Mistake(
        "model", ("--model.policy.pretrained=./nowhere",), ("policy.pretrained", "'./nowhere'", "config.json", "Qwen/")
    ),
    Mistake(
        "model without config",
        ("--model.policy.pretrained=./model",),
        ("no config.json",),
        model_without("config.json"),
    ),
    Mistake(
        "model without weights",
        ("--model.policy.pretrained=./model",),
        ("'./model' cannot be", "model.safetensors"),
        model_without("*.safetensors"),
    ),
    Mistake(
        "model without processor",
        ("--model.policy.pretrained=./model",),
        ("'./model'", "processor"),
        model_without("*process*"),
    ),
    Mistake(
        "damaged weights",
        ("--model.policy.pretrained=./model",),
        ("'./model' cannot be loaded",),
        lambda world: (model_without()(world), cut(world.directory / "model" / "model.safetensors")),
    ),
    Mistake(
        "hub",
        ("--model.policy.pretrained=Qwen/Qwen2.5-VL-3B-Instruct",),
        ("'Qwen/Qwen2.5-VL-3B-Instruct'", "hub cannot be reached", "--local-dir"),
        environment={"HF_ENDPOINT": "http://127.0.0.1:9"},
    ),
    Mistake(
        "benchmark",
        ("--config=evaluation/mathvista_mmmu.yaml",),
        ("AI4Math/MathVista", "download its parquet files"),
        command="validate",
        environment={"HF_ENDPOINT": "http://127.0.0.1:9"},
    ),
    Mistake("run directory", (), ("runs", "is a file", "save_dir"), file("runs", "")),
    Mistake(
        "vllm",
        ("--config=rollout/vllm_local.yaml",),
        ("needs vLLM", "pip install 'observe-r1[vllm]'"),
        absent="vllm",
    ),
    Mistake(
        "deepspeed",
        ("--config=strategies/deepspeed_zero2.yaml",),
        ("pip install 'observe-r1[deepspeed]'",),
        absent="deepspeed",
    ),
    Mistake(
        "logger",
        ("--trainer.logger=lightning.pytorch.loggers.CometLogger",),
        ("comet-ml", "pip install"),
        absent="comet_ml",
    ),
    Mistake(
        "server",
        (
            "--config=rollout/vllm_server.yaml",
            "--model.rollout.start_seconds=0.1",
            "--model.rollout.servers=[http://127.0.0.1:9]",
        ),
        ("http://127.0.0.1:9 did not answer", "observe-r1 serve"),
    ),
    Mistake(
        "address of a server",
        ("--config=rollout/vllm_server.yaml", "--model.rollout.servers=[x:8000]"),
        ("'x:8000'", "http://host:port"),
    ),
    Mistake("rows", ("ladder", "import", "nothing.jsonl", "out"), ("No such file", "nothing.jsonl"), on_its_own=True),
    Mistake("arguments", ("ladder", "import"), ("required", "input"), code=2, on_its_own=True),
    Mistake("predictions", ("score", "nothing.jsonl"), ("nothing.jsonl",), on_its_own=True),
    Mistake("audit", ("audit", "nothing"), ("nothing holds no shards", "ladder.json"), on_its_own=True),
    Mistake("inspect", ("ladder", "inspect", "nothing"), ("nothing holds no shards",), on_its_own=True),
    Mistake("export", ("export", "x.ckpt", "hf"), ("no file 'x.ckpt'", "checkpoints"), on_its_own=True),
    Mistake("export over", ("export", "{checkpoint}", "."), ("'.' exists", "name a new directory"), on_its_own=True),
]

CHECKPOINTS = [
    Mistake("none", ("--ckpt_path=x.ckpt",), ("no file 'x.ckpt'", "RUN_DIRECTORY/checkpoints")),
    Mistake("text", ("--ckpt_path=x.ckpt",), ("'x.ckpt' is not a checkpoint",), file("x.ckpt", "text")),
    Mistake(
        "cut",
        ("--ckpt_path=changed.ckpt",),
        ("'changed.ckpt' is not a checkpoint",),
        lambda world: (changed_checkpoint(lambda _: None)(world), cut(world.directory / "changed.ckpt")),
    ),
    Mistake(
        "of others",
        ("--ckpt_path=changed.ckpt",),
        ("not written by observe_r1",),
        changed_checkpoint(lambda c: c.pop("observe_r1")),
    ),
    Mistake("directory", ("--ckpt_path={checkpoint.parent}",), ("is a directory", "last.ckpt: name one")),
    Mistake(
        "older version",
        ("--ckpt_path=changed.ckpt",),
        ("another version", "lacks seconds", "observe-r1 export"),
        changed_checkpoint(lambda c: c["observe_r1"].pop("seconds")),
    ),
    Mistake(
        "other model",
        (*RESUME, "--model.policy.lora={{rank: 4}}"),
        ("lora_rank: None in the checkpoint, 4", "model.policy"),
    ),
    Mistake("other ladder", (*RESUME, "--data.ladder={other_ladder}"), ("was 24 and is 12", "Resume with the ladder")),
    Mistake("other order", (*RESUME, "--data.order=random"), ("data.order was ladder and is random", "Resume with")),
]

REWARDS = [
    Mistake("syntax", OWN, ("invalid syntax", "mine.py, line 1"), file("mine.py", "class Mine(:\n"), code=2),
    Mistake("no reward", OWN, ("mine.Mine", "subclass of Reward"), file("mine.py", "class Mine: pass\n"), code=2),
    Mistake("import", OWN, ("No module named 'nosuch'", "install"), file("mine.py", "import nosuch\n"), code=2),
    Mistake(
        "method missing",
        OWN,
        ("abstract", "mine.Mine lacks score"),
        file("mine.py", "from observe_r1.rewards import Reward\nclass Mine(Reward):\n    def scores(self): ...\n"),
        code=2,
    ),
    Mistake(
        "raises",
        OWN,
        ('mine.py", line 4, in score', "{{}}['a']", "KeyError: 'a'", "reward 'odd'"),
        file("mine.py", REWARD + "{}['a']\n"),
    ),
    Mistake(
        "setup",
        OWN,
        ('mine.py", line 6, in setup', "has no attribute 'missing'"),
        file("mine.py", REWARD + "...\n    def setup(self):\n        self.missing\n"),
    ),
    Mistake("none", OWN, ("reward 'odd'", "with None", "finite number"), file("mine.py", REWARD + "pass\n")),
    Mistake(
        "nan", OWN, ("reward 'odd'", "with nan", "finite number"), file("mine.py", REWARD + "return float('nan')\n")
    ),
    Mistake(
        "length",
        OWN,
        ("reward 'odd' returned [1, 1", "for [4, 4"),
        file("mine.py", REWARD + "...\n    def score_groups(self, groups): return [[1.0] for _ in groups]\n"),
    ),
    Mistake(
        "flat",
        OWN,
        ("reward 'odd' returned [1.0, 1.0", "a list for every group"),
        file("mine.py", REWARD + "...\n    def score_groups(self, groups): return [1.0 for _ in groups]\n"),
    ),
]

ALL = [
    pytest.param(mistake, id=f"{kind}: {mistake.name}")
    for kind, mistakes in (
        ("name", WRONG_NAMES),
        ("value", WRONG_VALUES),
        ("combination", DO_NOT_FIT),
        ("missing", NOT_THERE),
        ("checkpoint", CHECKPOINTS),
        ("reward", REWARDS),
    )
    for mistake in mistakes
]


@pytest.fixture(scope="module")
def checkpoint(tiny_ladder: Path, forking: ForkingCommandLine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one step on the tiny ladder, in the middle of its epoch."""
    directory = tmp_path_factory.mktemp("run")
    saving = ("--trainer.callbacks=lightning.pytorch.callbacks.ModelCheckpoint", "--trainer.callbacks.save_last=true")
    saving += ("--trainer.callbacks.dirpath=checkpoints", "--trainer.logger=false")
    code, output = forking(directory, ["fit", *SHORT, *saving, f"--data.ladder={tiny_ladder}"], {})
    assert code == 0, output
    return directory / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize("mistake", ALL)
def test_mistakes_are_named(
    mistake: Mistake,
    forking: ForkingCommandLine,
    checkpoint: Path,
    tiny_ladder: Path,
    held_out_ladder: Path,
    tmp_path: Path,
) -> None:
    if mistake.absent and find_spec(mistake.absent) is not None:
        pytest.skip(f"{mistake.absent} is installed, so this is no mistake")
    world = World(tmp_path, tiny_ladder, held_out_ladder, checkpoint)
    mistake.prepare(world)
    arguments = [argument.format_map(vars(world)) for argument in mistake.arguments]
    if not mistake.on_its_own:
        ladder = [] if mistake.name == "no ladder" else [f"--data.ladder={tiny_ladder}"]
        arguments = [mistake.command, *SHORT, *ladder, *arguments]
    code, output = forking(tmp_path, arguments, mistake.environment)
    error = output[max(output.rfind("\nobserve-r1"), 0) :]  # the start panel may stand before it
    assert "observe-r1" in error, output
    for words in mistake.expected:
        assert words.format_map(vars(world)) in error, output
    assert code == mistake.code, output
    assert len(error.splitlines()) <= LINES, output
    shown = re.findall(r'File "(.*)", line', error)
    assert all(Path(path).name == "mine.py" for path in shown), output
