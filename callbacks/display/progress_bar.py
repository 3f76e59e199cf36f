"""The progress bar of a terminal, and the lines that take its place where there is none."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from observe_r1.callbacks.display.phase import PhaseHooks
from observe_r1.callbacks.terminal import draws, figures_that_matter, optimizer_steps, say
from observe_r1.module import ObserveR1
from observe_r1.readable import clock

WIDE, WIDEST = 100, 120  # columns from which there is room for the held-out pass rate, and for a longer bar


class RolloutProgressBar(PhaseHooks, RichProgressBar):
    """Lightning's rich bar, counted in optimizer steps, with the phase and the figures that matter, on one line.

    Args:
        refresh_rate: Times a second that it is drawn.
    """

    def __init__(self, refresh_rate: int = 10) -> None:
        super().__init__(refresh_rate=refresh_rate, theme=RichProgressBarTheme(metrics=""))
        self.figures: dict[str, str] = {}
        self._figures_step = -1

    def configure_columns(self, trainer: L.Trainer) -> list[ProgressColumn]:
        assert self._console is not None
        width = self._console.width
        return [
            TextColumn("{task.description}"),
            _Count(self, trainer.accumulate_grad_batches),
            BarColumn(bar_width=6 if width < WIDE else 10 if width < WIDEST else 20),
            _Time("" if width < WIDE else " left"),
            _Figures(self, width),
        ]

    def phase_changed(self) -> None:
        if self.progress is not None and self.train_progress_bar_id is not None:
            self.progress.update(self.train_progress_bar_id, description=self.phase)

    @property
    def total_train_batches(self) -> int | float:
        """Of the whole run, not of an epoch."""
        steps = optimizer_steps(self.trainer)
        return float("inf") if steps is None else steps * self.trainer.accumulate_grad_batches

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.train_progress_bar_id is None:  # later epochs go on with the same bar
            super().on_train_epoch_start(trainer, pl_module)

    def _update(self, progress_bar_id: TaskID | None, current: int, visible: bool = True, hard: bool = False) -> None:
        of_training = progress_bar_id is not None and progress_bar_id == self.train_progress_bar_id
        done = self.trainer.fit_loop.total_batch_idx + 1 if of_training else current
        super()._update(progress_bar_id, done, visible, hard)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Nothing for Lightning's own column: ours takes less room."""
        assert isinstance(pl_module, ObserveR1)
        if trainer.global_step != self._figures_step:  # reading them waits for the GPU
            self.figures, self._figures_step = figures_that_matter(trainer, pl_module), trainer.global_step
        return {}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.progress is not None and self.train_progress_bar_id is not None:
            self.progress.update(self.train_progress_bar_id, description="done")
        self._stop_progress()  # what is said after it stands below it

    def is_training(self, task: Task) -> bool:
        """Whether the task counts micro-batches of the training, not held-out questions."""
        return task.id == self.train_progress_bar_id

    def _get_train_description(self, current_epoch: int) -> str:
        return self.phase

    @property
    def sanity_check_description(self) -> str:
        return "answering"

    @property
    def validation_description(self) -> str:
        return "answering"


class _Count(ProgressColumn):
    """Optimizer steps of the training, batches of everything else."""

    def __init__(self, bar: RolloutProgressBar, micro_batches: int) -> None:
        super().__init__()
        self.bar = bar
        self.micro_batches = micro_batches

    def render(self, task: Task) -> Text:
        parts = self.micro_batches if self.bar.is_training(task) else 1
        total = "?" if task.total is None or task.total == float("inf") else str(int(task.total) // parts)
        return Text(f"{int(task.completed) // parts}/{total}")


class _Time(ProgressColumn):
    """What is left."""

    max_refresh = 0.5

    def __init__(self, suffix: str) -> None:
        super().__init__()
        self.suffix = suffix

    def render(self, task: Task) -> Text:
        if task.finished:
            return Text(clock(task.finished_time or 0.0), style="dim")
        remaining = task.time_remaining
        return Text(("-:--" if remaining is None else clock(remaining)) + self.suffix, style="dim")


class _Figures(ProgressColumn):
    """As many figures as there is room for, on one line."""

    def __init__(self, bar: RolloutProgressBar, width: int) -> None:
        super().__init__()
        self.bar = bar
        self.names = (
            ("reward", "pass", "length", "KL") if width < WIDE else ("reward", "pass", "length", "KL", "held-out")
        )
        self.space = " " if width < WIDE else "  "

    def render(self, task: Task) -> Text:
        shown = [f"{name} {self.bar.figures[name]}" for name in self.names if name in self.bar.figures]
        return Text(self.space.join(shown) if self.bar.is_training(task) else "", no_wrap=True)


class ProgressLines(PhaseHooks, ProgressBar):
    """A plain line every so often, for logs: the first step, then one in every so many seconds, and every validation.

    Args:
        every_n_seconds: From one line to the next.
    """

    def __init__(self, every_n_seconds: float = 30.0) -> None:
        super().__init__()
        if not every_n_seconds >= 0:
            raise ValueError(f"ProgressLines.every_n_seconds is {every_n_seconds}: use 0 or more.")
        self.every_n_seconds = every_n_seconds
        self._started = time.monotonic()
        self._told = -float("inf")
        self._enabled = True
        self._first_step = self._last_step = 0

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._started = time.monotonic()
        self._first_step = self._last_step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *arguments: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *arguments)
        is_due = time.monotonic() - self._told >= self.every_n_seconds or trainer.global_step == optimizer_steps(
            trainer
        )
        if self._enabled and trainer.global_step != self._last_step and is_due:
            self._tell(trainer, pl_module)
        self._last_step = trainer.global_step

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        assert isinstance(pl_module, ObserveR1)
        rate = pl_module.validation_figures.get("pass_rate")
        if rate is not None and trainer.state.fn == "fit" and self._enabled:
            say(f"Held-out questions at step {trainer.global_step}: pass rate {float(rate):.1%}")

    def _tell(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, ObserveR1)
        self._told = time.monotonic()
        steps, total, passed = trainer.global_step, optimizer_steps(trainer), self._told - self._started
        left = "" if total is None else f", {clock(passed / (steps - self._first_step) * (total - steps))} left"
        figures = figures_that_matter(trainer, module)
        shown = "  ".join(f"{name} {value}" for name, value in figures.items() if name != "held-out")
        say(f"step {steps}/{'?' if total is None else total}  {shown}  ({clock(passed)} passed{left})")


def progress_display(console: Console) -> ProgressBar:
    """What suits the console."""
    return RolloutProgressBar() if draws(console) else ProgressLines()
