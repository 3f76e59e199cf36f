"""What a user is told about a mistake: the value, what may stand there, and what to do, in a few lines.

The command line is the real one, up to the error. A mistake is a row of the table of its kind.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from mistake import Mistake, World

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


@pytest.fixture(scope="session")
def checkpoint(tiny_ladder: Path, commands: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one step on the tiny ladder, in the middle of its epoch."""
    directory = tmp_path_factory.mktemp("run")
    saving = ("--trainer.callbacks=lightning.pytorch.callbacks.ModelCheckpoint", "--trainer.callbacks.save_last=true")
    saving += ("--trainer.callbacks.dirpath=checkpoints", "--trainer.logger=false")
    arguments = ["observe-r1", "fit", *SHORT, *saving, f"--data.ladder={tiny_ladder}"]
    code, output = commands(directory, shlex.join(arguments))
    assert code == 0, output
    return directory / "checkpoints" / "last.ckpt"


@pytest.fixture
def told(
    commands: Any, checkpoint: Path, tiny_ladder: Path, held_out_ladder: Path, tmp_path: Path
) -> Callable[[Mistake], None]:
    """Makes a mistake and compares the answer with its row."""

    def make(mistake: Mistake) -> None:
        if mistake.absent and find_spec(mistake.absent) is not None:
            pytest.skip(f"{mistake.absent} is installed, so this is no mistake")
        world = World(tmp_path, tiny_ladder, held_out_ladder, checkpoint)
        mistake.prepare(world)
        arguments = [argument.format_map(vars(world)) for argument in mistake.arguments]
        if not mistake.on_its_own:
            ladder = [] if mistake.name == "no ladder" else [f"--data.ladder={tiny_ladder}"]
            arguments = [mistake.command, *SHORT, *ladder, *arguments]
        code, output = commands(tmp_path, shlex.join(["observe-r1", *arguments]))
        error = output[max(output.rfind("\nobserve-r1"), 0) :]  # the start panel may stand before it
        assert "observe-r1" in error, output
        for words in mistake.expected:
            assert words.format_map(vars(world)) in error, output
        assert code == mistake.code, output
        assert len(error.splitlines()) <= LINES, output
        shown = re.findall(r'File "(.*)", line', error)
        assert all(Path(path).name == "mine.py" for path in shown), output

    return make
