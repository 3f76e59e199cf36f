"""How callbacks write to the terminal: with colours where there is one, in plain whole lines where there is none."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from rich import get_console
from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from observe_r1.module import ObserveR1


def draws(console: Console) -> bool:
    """Whether it is a terminal that can move its cursor; a pipe, a file and `TERM=dumb` get plain lines."""
    return console.is_terminal and not console.is_dumb_terminal


def say(*lines: RenderableType) -> None:
    """Prints lines above a progress bar, if there is one. Square brackets in strings are only that."""
    console = get_console()  # Lightning's bar draws on the same
    for line in lines:
        # what is piped into a file is not cut to the width of a terminal that nobody has
        console.print(line, highlight=False, markup=False, soft_wrap=not draws(console))


def show(title: str, content: dict[str, str]) -> None:
    """Names and values, one under the other: in a frame on a terminal, elsewhere in plain lines."""
    if not draws(get_console()):
        say(title, *(f"  {name:<12} {value}" for name, value in content.items()))
        return
    table = Table.grid(padding=(0, 2))
    for name, value in content.items():
        table.add_row(Text(name, style="bold"), Text(value))
    say(Panel(table, title=title, title_align="left", border_style="blue"))


def figures_that_matter(trainer: L.Trainer, module: ObserveR1) -> dict[str, str]:
    """Of the last rollout and the last step; what is not known yet is left out."""
    logged, rollout = trainer.callback_metrics, module.rollout_figures
    found = {
        "reward": (rollout.get("rollout/reward"), "{:.2f}"),
        "pass": (rollout.get("rollout/pass_rate"), "{:.0%}"),
        "length": (rollout.get("rollout/length"), "{:.0f}"),
        "KL": (logged.get("train/kl"), "{:.2g}"),
        "held-out": (module.validation_figures.get("pass_rate"), "{:.0%}"),
    }
    return {name: form.format(float(value)) for name, (value, form) in found.items() if value is not None}


def optimizer_steps(trainer: L.Trainer) -> int | None:
    """Of the whole run; None where it has no end."""
    micro_batches, epochs = trainer.num_training_batches, trainer.max_epochs
    limits = [trainer.max_steps] if trainer.max_steps >= 0 else []
    if epochs is not None and epochs >= 0 and micro_batches != float("inf"):
        limits.append(epochs * -(-int(micro_batches) // trainer.accumulate_grad_batches))
    return min(limits, default=None)


def tensorboard(trainer: L.Trainer, run_directory: Path) -> str:
    """The command that shows the curves of all runs of the experiment; empty where another logger has them."""
    is_used = any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers)
    return f"tensorboard --logdir {run_directory.parent}" if is_used else ""
