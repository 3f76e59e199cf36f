"""What a user sees: on a terminal, and in a file that output is piped into."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RUN = (
    *("fit", "--config=quickstart.yaml", "--trainer.val_check_interval=2", "--trainer.max_steps=4"),
    *("--model.sampling={group_size: 4, max_new_tokens: 20}", "--data.prompts_per_rollout=8"),
    "--data.class_path=observe_r1.datamodules.NeuraLadderDataModule",
)


def on_terminal(columns: int, directory: Path, *arguments: str) -> str:
    """What `observe-r1` writes to a terminal of this width."""
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "observe_r1", *arguments],
        cwd=directory,
        env={**environment, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    written = b""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        written += part
    os.close(main)
    assert process.wait(300) == 0, written.decode()[-3000:]
    return written.decode()


def lines_of(written: str) -> list[str]:
    """Without escape codes; what is drawn over the same line counts as lines."""
    return [line for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)) if line.strip()]


@pytest.mark.slow
def test_on_a_terminal(tmp_path: Path, tiny_ladder: Path, held_out_ladder: Path) -> None:
    data = (f"--data.ladder={tiny_ladder}", f"--data.held_out={held_out_ladder}")
    written = on_terminal(80, tmp_path, *RUN, *data)
    lines = lines_of(written)
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    panel, rest = text.split("╰", 1)
    assert "─ observe_r1 ─" in panel
    for shown in (
        "899 K parameters",
        "difficulty unknown, order ladder; 12 held out",
        "8 prompts × 4 completions",
        "CPU",
    ):
        assert shown in " ".join(panel.replace("│", " ").split())
    assert "checkpoints/last.ckpt" in panel
    bars = [line for line in lines if "━" in line]
    phases = {line.split()[0] for line in bars}
    assert {"sampling", "training", "done"} <= phases
    (last,) = {line.strip() for line in bars if line.startswith("done")}
    assert re.fullmatch(r"done 4/4 ━+ [\d:]+ reward \d\.\d\d pass \d+% length \d+ KL \S+", last)
    closing = rest[rest.index("─ finished ─") :]
    assert re.search(r"pass rate +\d+\.\d% \(step 0\) → \d+\.\d% \(step 4\), best", closing)
    assert "no warnings" in closing
    assert "━" not in closing  # the bar is above
    for noise in ("Tip:", "GPU available: False", "v_num", "Warning"):
        assert noise not in text


@pytest.mark.slow
def test_in_a_pipe(
    tmp_path: Path, command_line: Callable[[Path], Any], tiny_ladder: Path, held_out_ladder: Path
) -> None:
    data = (f"--data.ladder={tiny_ladder}", f"--data.held_out={held_out_ladder}")
    run = command_line(tmp_path)
    output = run(*RUN, *data)
    assert "\x1b" not in output
    assert "\r" not in output
    assert not set("━╭│") & set(output)
    lines = output.splitlines()
    steps = [line.split()[1] for line in lines if line.startswith("step ")]
    assert (steps[0], steps[-1]) == ("1/4", "4/4")
    assert len(lines) - len(steps) < 43  # a slow run says more steps: one in every half minute
    assert len(set(lines)) == len(lines)  # nothing is said twice
    assert re.search(r"step 4/4  reward \d\.\d\d  pass \d+%  length \d+  KL \S+  \(\S+ passed, 0:00 left\)", output)
    validations = re.findall(r"Held-out questions at step (\d): pass rate \d+\.\d%", output)
    assert validations == ["0", "2", "4"]
    assert re.search(r"^  next +observe-r1 validate --config \S+ --ckpt_path \S+$", output, re.MULTILINE)
    # the command that it says works
    command = re.search(r"^  next +observe-r1 (.*)$", output, re.MULTILINE)
    assert command is not None
    assert "val/pass_rate" in run(*command[1].split())


@pytest.mark.slow
def test_a_progress_bar_of_the_user_takes_the_place_of_ours(
    tmp_path: Path, command_line: Callable[[Path], Any], tiny_ladder: Path
) -> None:
    quick = (*RUN, f"--data.ladder={tiny_ladder}", "--trainer.max_steps=1", "--trainer.num_sanity_val_steps=0")
    output = command_line(tmp_path)(*quick, "--trainer.callbacks+=lightning.pytorch.callbacks.TQDMProgressBar")
    assert "Epoch 0:" in output
    assert "step 1/1" not in output
    assert "finished" in output


def test_stopped_before_the_first_checkpoint(commands: Any, tmp_path: Path, tiny_ladder: Path) -> None:
    """By Ctrl-C, which has no message of its own."""
    (tmp_path / "stop.py").write_text(
        "import lightning as L\n\n\nclass Stop(L.Callback):\n    def on_train_batch_end(self, trainer, *_):\n"
        "        if trainer.global_step == 1:\n            raise KeyboardInterrupt\n"
    )
    callbacks = ("--trainer.callbacks=[]", "--trainer.callbacks+=stop.Stop")
    callbacks += ("--trainer.callbacks+=observe_r1.callbacks.RunSummary", "--trainer.num_sanity_val_steps=0")
    command = shlex.join(["observe-r1", *RUN, *callbacks, f"--data.ladder={tiny_ladder}"])
    code, output = commands(tmp_path, command)
    assert code == 1, output
    assert "Stopped at step 1, before this run saved a checkpoint." in output
    (summary,) = tmp_path.glob("runs/quickstart/*/summary.json")
    assert json.loads(summary.read_text())["status"] == "KeyboardInterrupt"
