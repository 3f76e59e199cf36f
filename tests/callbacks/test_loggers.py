"""W&B, MLflow, CSV and TensorBoard through Lightning's loggers: what they hold is read back from their own files."""

from __future__ import annotations

import csv
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from observe_r1.callbacks import HeldOutAnswers, RewardLogger, RunSummary
from observe_r1.callbacks.run_directory import run_directory
from observe_r1.datamodules import NeuraLadderDataModule
from observe_r1.loading import PolicyOptions
from observe_r1.module import ObserveR1
from observe_r1.rollout import SamplingOptions

SHORT = (
    "--trainer.enable_model_summary=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.accelerator=cpu",
    "--model.sampling.group_size=4",
    "--model.sampling.max_new_tokens=20",
    "--data.class_path=observe_r1.datamodules.NeuraLadderDataModule",
    "--data.prompts_per_rollout=8",
)


class OwnLogger(Logger):
    """As anybody may write one: figures only."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    name, version = "own", 7

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.metrics.update(metrics)

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...


def train(loggers: list[Logger], directory: Path, ladder: Path, held_out: Path, callbacks: list[L.Callback]) -> None:
    """A training of one rollout, with validations before and after it."""
    trainer = L.Trainer(
        accelerator="cpu", logger=loggers, max_steps=1, log_every_n_steps=1, num_sanity_val_steps=-1,
        val_check_interval=1, enable_progress_bar=False, enable_model_summary=False, default_root_dir=directory,
        callbacks=[RewardLogger(), HeldOutAnswers(questions=3), RunSummary(), ModelCheckpoint(), *callbacks],
    )  # fmt: skip
    module = ObserveR1(PolicyOptions("quickstart"), sampling=SamplingOptions(group_size=4, max_new_tokens=20))
    trainer.fit(module, NeuraLadderDataModule(str(ladder), held_out=str(held_out), prompts_per_rollout=8))


class Directories(L.Callback):
    """Where the parts of a run lie, seen by every rank from `setup` on."""

    found: Path | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.found = run_directory(trainer)


@pytest.mark.slow
def test_mlflow_tensorboard_and_an_unknown_logger_at_once(
    tmp_path: Path, tiny_ladder: Path, held_out_ladder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, caplog: Any
) -> None:
    """MLflow comes first and keeps its runs in a database: it has no directory, the run has one all the same."""
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    from lightning.pytorch.loggers import MLFlowLogger
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    address = f"sqlite:///{tmp_path}/mlflow.db"
    first = MLFlowLogger("quickstart", tracking_uri=address, artifact_location=str(tmp_path / "artifacts"))
    board, own = TensorBoardLogger(tmp_path / "board"), OwnLogger()
    directories = Directories()
    with caplog.at_level("INFO"):
        train([first, board, own], tmp_path / "root", tiny_ladder, held_out_ladder, [directories])

    run = directories.found
    assert run == tmp_path / "root" / str(first.experiment_id) / str(first.run_id)
    assert {path.name for path in run.iterdir()} == {"checkpoints", "completions", "summary.json"}
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"
    answers = [json.loads(line) for line in (run / "completions" / "held_out.jsonl").read_text().splitlines()]
    assert [row["step"] for row in answers] == [0, 0, 0, 1, 1, 1]
    assert [row["id"] for row in answers[:3]] == [row["id"] for row in answers[3:]]

    client = MlflowClient(tracking_uri=address)
    metrics = client.get_run(first.run_id).data.metrics
    assert {"train/entropy", "train/loss", "rollout/reward", "val/pass_rate", "seconds/generate"} <= metrics.keys()
    (picture,) = (a.path for a in client.list_artifacts(first.run_id, "images") if a.path.endswith(".png"))
    with Image.open(client.download_artifacts(first.run_id, picture, str(tmp_path))) as stored:
        assert stored.size == Image.open(run / "completions" / "step-000000.png").size

    events = EventAccumulator(board.log_dir, size_guidance={"histograms": 0, "images": 0}).Reload()
    assert events.Tags()["images"] == ["completions"]
    assert {"histogram/reward", "histogram/length"} <= set(events.Tags()["histograms"])
    assert own.metrics.keys() >= metrics.keys() - {"epoch"}
    told = [record.getMessage() for record in caplog.records if "OwnLogger" in record.getMessage()]
    assert told == ["OwnLogger shows no pictures; they are in the run directory."]


@pytest.mark.slow
def test_wandb_chosen_on_the_command_line(
    tmp_path: Path, tiny_ladder: Path, held_out_ladder: Path, command_line: Callable[[Path], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Offline; the picture, a histogram, the figures and the config are in the file that `wandb sync` would send."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    command_line(tmp_path)(
        "fit", "--config=quickstart.yaml", *SHORT, "--trainer.max_steps=2", "--trainer.logger=WandbLogger",
        f"--data.ladder={tiny_ladder}", f"--data.held_out={held_out_ladder}",
    )  # fmt: skip
    (sent,) = (tmp_path / "runs" / "wandb").glob("offline-run-*/run-*.wandb")
    identifier = sent.stem.removeprefix("run-")
    run = (
        tmp_path / "runs" / "lightning_logs" / identifier
    )  # save_dir of the config goes on to hold; the default project
    assert {p.name for p in run.iterdir()} == {"checkpoints", "completions", "config.yaml", "hf", "summary.json"}

    history, config = read_wandb(sent)
    assert {"train/kl", "rollout/reward", "val/pass_rate", "verification/correct", "lr-AdamW"} <= history.keys()
    assert history["completions/_type"] == '"images/separated"'
    (name,) = json.loads(history["completions/filenames"])
    with Image.open(sent.parent / "files" / name) as stored:
        assert stored.size == Image.open(run / "completions" / "step-000000.png").size
    assert history["histogram/reward/_type"] == '"histogram"'
    assert sum(json.loads(history["histogram/reward/values"])) == 8 * 4
    assert json.loads(config["model"])["sampling"]["group_size"] == 4


def read_wandb(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """First values of the figures, and the config, as JSON texts by name. The file is a log as LevelDB writes it."""
    from wandb.proto import wandb_internal_pb2

    history, config = dict[str, str](), dict[str, str]()
    content, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # no record header fits into the rest of this block
            place += 32768 - place % 32768
            continue
        _, size, kind = struct.unpack("<IHB", content[place : place + 7])
        parts += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            for item in record.history.item:
                history.setdefault("/".join(item.nested_key) or item.key, item.value_json)
            config |= {item.key: item.value_json for item in record.config.update}
    return history, config


GUARD = """
import os, socket
connect = socket.socket.connect
def watched(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
        open(os.environ["CONNECTIONS"], "a").write(f"{address}\\n")
    return connect(self, address)
socket.socket.connect = watched
def resolved(host, *rest, **options):
    if host not in (None, "", "localhost", "127.0.0.1", "::1"):
        open(os.environ["CONNECTIONS"], "a").write(f"{host}\\n")
    return resolve(host, *rest, **options)
resolve, socket.getaddrinfo = socket.getaddrinfo, resolved
"""


@pytest.mark.slow
def test_csv_by_its_overlay_and_nothing_phones_home(
    tmp_path: Path, tiny_ladder: Path, held_out_ladder: Path, command_line: Callable[[Path], Any]
) -> None:
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / "guard.py").write_text(GUARD)
    (tmp_path / "watched.yaml").write_text("trainer: {max_steps: 4}\n")
    code = "import guard; from observe_r1.cli import main; main()"
    finished = subprocess.run(
        [sys.executable, "-c", code, "fit", "--config=quickstart.yaml", "--config=loggers/csv.yaml", *SHORT,
         "--config=watched.yaml", f"--data.ladder={tiny_ladder}", f"--data.held_out={held_out_ladder}"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path / "guard"),
             "CONNECTIONS": str(tmp_path / "connections.txt")},
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert not (tmp_path / "connections.txt").exists(), (tmp_path / "connections.txt").read_text()
    assert finished.stdout.count("CSVLogger shows no pictures") + finished.stderr.count("CSVLogger shows no") == 1
    run = tmp_path / "runs" / "observe_r1" / "version_0"
    files = {"checkpoints", "completions", "config.yaml", "hf", "metrics.csv", "summary.json"}
    assert {path.name for path in run.iterdir()} == files
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 4
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {"train/kl", "rollout/reward", "val/pass_rate", "verification/correct"} <= rows[0].keys()
    by_step = {int(row["step"]) for row in rows if row["rollout/reward"]}
    assert by_step == {0, 2}  # once for a rollout, where its first optimizer step is


def test_the_run_directory_is_where_checkpoints_go(tmp_path: Path) -> None:
    """Lightning's own rule, asked of Lightning."""
    own = OwnLogger()
    for logger, expected in (
        (TensorBoardLogger(tmp_path, "board", "v"), tmp_path / "board" / "v"),
        (CSVLogger(tmp_path, "table"), tmp_path / "table" / "version_0"),
        (own, tmp_path / "root" / "own" / "version_7"),
        ([own, CSVLogger(tmp_path, "table")], tmp_path / "root" / "own" / "version_7"),
        (False, tmp_path / "root"),
    ):
        trainer = L.Trainer(logger=logger, default_root_dir=tmp_path / "root", accelerator="cpu", barebones=False)
        assert run_directory(trainer) == expected
        checkpoints = ModelCheckpoint()
        checkpoints.setup(trainer, L.LightningModule(), "fit")
        assert checkpoints.dirpath == str(expected / "checkpoints")
    assert run_directory(L.Trainer(fast_dev_run=True, accelerator="cpu")) is None
