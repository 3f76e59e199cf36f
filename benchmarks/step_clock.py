"""Seconds of training steps and of their parts, read on equal terms from either trainer."""

from __future__ import annotations

import time

from observe_r1.phase_clock import PhaseClock


class StepClock(PhaseClock):
    """Wall seconds of steps, each from the end of the one before to its own end, and of the phases in it."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[dict[str, float]] = []
        self._train_started = 0.0
        self.start_run()

    def start_run(self) -> None:
        self._ended, self._cpu = time.perf_counter(), time.process_time()

    def start_training(self) -> None:
        """The rollout is complete: what follows is forward, backward and optimizer."""
        self._train_started = time.perf_counter()

    def end_step(self) -> None:
        now, cpu = time.perf_counter(), time.process_time()
        self.add("train", now - self._train_started)
        step = now - self._ended
        other = step - sum(self.last.values())  # image processing, rewards and the loader
        self.seconds.append({"step": step, **self.last, "other": other, "step_cpu": cpu - self._cpu})
        self.restart()
        self._ended, self._cpu = now, cpu
