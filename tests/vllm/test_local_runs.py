"""Trainings with vLLM in the process, from the command line with the shipped config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from .comparison import NEEDS_VLLM

pytestmark = NEEDS_VLLM

# Beside the run, as a user's own file.
NOTES = """
import json, os, signal
from pathlib import Path
import lightning as L

class Notes(L.Callback):
    def __init__(self, killed_at: int = 0):
        self.killed_at, self.seen = killed_at, 0

    def on_rollout_end(self, trainer, module, experience):
        line = {
            "step": trainer.global_step,
            "dtype": str(module.engine._llm.model_config.dtype),
            "parity": experience.metrics["parity/mean"],
            "tokens": [[c.token_ids.tolist() for c in group.completions] for group in experience.groups],
        }
        with Path("notes.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\\n")

    def on_train_batch_end(self, *_):
        self.seen += 1
        if self.seen == self.killed_at and not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
"""

BASE = (
    "fit",
    "--config=quickstart_vllm.yaml",
    "--trainer.max_steps=6",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.limit_val_batches=0",
    "--trainer.enable_progress_bar=false",
    "--trainer.logger=false",
    "--model.sampling.group_size=4",
    "--model.sampling.max_new_tokens=24",
    "--data.class_path=observe_r1.datamodules.NeuraLadderDataModule",
    "--data.prompts_per_rollout=6",
    "--data.workers=0",
)
CHECKPOINTS = "{dirpath: checkpoints, every_n_train_steps: 1, save_last: true, save_top_k: 0}"
CALLBACKS = (
    "[{class_path: observe_r1.callbacks.VLLMWeightSync, init_args: {error_above: %s}}, "
    f"{{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {CHECKPOINTS}}}, "
    "{class_path: notes.Notes, init_args: {killed_at: %d}}]"
)


def prepared(directory: Path, command_line: Any) -> Any:
    directory.mkdir()
    (directory / "notes.py").write_text(NOTES)
    return command_line(directory)


def notes(directory: Path) -> list[dict[str, Any]]:
    """In the order of their steps; of a rollout that was collected twice, the last time."""
    lines = map(json.loads, (directory / "notes.jsonl").read_text().splitlines())
    return list({line["step"]: line for line in lines}.values())


def test_a_killed_and_resumed_training_equals_an_uninterrupted_one(
    tmp_path: Path, tiny_ladder: Path, command_line: Any
) -> None:
    line = (*BASE, f"--data.ladder={tiny_ladder}", "--trainer.callbacks")
    prepared(tmp_path / "whole", command_line)(*line, CALLBACKS % (0.2, 0))
    run = prepared(tmp_path / "killed", command_line)
    run(*line, CALLBACKS % (0.2, 3), expect=-9)  # in the middle of a rollout
    run(*line, CALLBACKS % (0.2, 3), "--ckpt_path=checkpoints/last.ckpt")
    whole, killed = notes(tmp_path / "whole"), notes(tmp_path / "killed")
    assert len(whole) == 3
    assert [note["tokens"] for note in whole] == [note["tokens"] for note in killed]
    assert all(note["parity"] < 1e-4 for note in whole)
    one, other = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "killed")
    )
    # vLLM's caches are empty after a resume, and log-probs from a cache differ in the last bits
    assert all(torch.allclose(one[name], other[name], rtol=0, atol=1e-5) for name in one)


def test_under_autocast_vllm_computes_in_its_dtype(tmp_path: Path, tiny_ladder: Path, command_line: Any) -> None:
    line = (*BASE, f"--data.ladder={tiny_ladder}", "--trainer.precision=bf16-mixed", "--trainer.callbacks")
    prepared(tmp_path / "run", command_line)(*line, CALLBACKS % (0.2, 0))
    assert {note["dtype"] for note in notes(tmp_path / "run")} == {"torch.bfloat16"}
    assert all(1e-5 < note["parity"] < 0.02 for note in notes(tmp_path / "run"))
