"""Files, models, servers and packages that are not there, or damaged."""

from __future__ import annotations

from collections.abc import Callable
from shutil import copytree

import pytest
from mistake import Mistake, changed_ladder, cut, file, model_without

MISTAKES = [
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
    ),
    Mistake(
        "benchmark",
        ("--config=evaluation/mathvista_mmmu.yaml",),
        ("AI4Math/MathVista", "download its parquet files"),
        command="validate",
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
    Mistake(
        "export into files",
        ("--trainer.callbacks+=observe_r1.callbacks.HFExport", "--trainer.callbacks.directory=models"),
        ("HFExport.directory is 'models'", "would be replaced", "name a new"),
        lambda world: copytree(world.ladder, world.directory / "models"),
    ),
    Mistake(
        "answers over answers",
        ("--data.held_out={ladder}", "--trainer.callbacks+=observe_r1.callbacks.CompletionWriter"),
        ("completions.jsonl exists already", "name another file"),
        file("completions.jsonl", "{{}}"),
        command="predict",
    ),
    Mistake("export over", ("export", "{checkpoint}", "."), ("'.' exists", "name a new directory"), on_its_own=True),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_is_named(mistake: Mistake, told: Callable[[Mistake], None]) -> None:
    told(mistake)
