"""Benchmarks inside the training: asks the live rollout engine, logs and saves what it answers."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Generator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Literal

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from rich import get_console
from rich.progress import Progress

from observe_r1.callbacks.media.benchmark_picture import draw_examples, examples_of
from observe_r1.callbacks.media.logger_media import log_picture
from observe_r1.callbacks.run_directory import run_directory
from observe_r1.evaluation.asking import Asking, blocks_of, share, spread, weights_checksum
from observe_r1.evaluation.benchmark import Benchmark
from observe_r1.evaluation.metric import BenchmarkScores
from observe_r1.evaluation.predictions import (
    Header,
    Prediction,
    PredictionLog,
    answered_before,
    partial_path,
    write_predictions,
)
from observe_r1.evaluation.report import Marks, Report, report
from observe_r1.module import ObserveR1
from observe_r1.ranks import any_rank, over_ranks
from observe_r1.rollout.base import SamplingOptions


class BenchmarkEvaluation(L.Callback):
    """Asks the questions of benchmarks every so many optimizer steps, and with `observe-r1 validate`.

    Figures are logged as `NAME/accuracy` and so on, where `ModelCheckpoint(monitor="mathvista/accuracy")` finds them.
    Predictions are saved as `DIRECTORY/NAME/step-000100.jsonl` with a report beside them; an interrupted evaluation of
    the same weights goes on where it stopped. The training is not touched: same weights with and without, bit for bit.

    Args:
        benchmarks: By class_path, such as `observe_r1.evaluation.MathVista`.
        every_n_steps: Optimizer steps from one evaluation to the next; 0 for none within the training.
        at_start: Also before the first step.
        at_end: Also after the last step.
        max_samples: Ask this many questions of each, spread evenly; null for all.
        max_new_tokens: Longest response; null for that of the held-out questions.
        temperature: 0 is greedy.
        questions_per_batch: Questions asked in one call of the engine. The same questions share a call on any number of
            ranks, so responses do not depend on it; vLLM wants many.
        example_rows: Questions in the table of examples; 0 for none.
        directory: Where predictions go; null for `evaluation` in the run directory.
        on_error: What an evaluation that fails does to the training: `warn` goes on, `raise` ends it. Benchmarks whose
            data cannot be read are refused at the start in any case; `observe-r1 validate` always ends with the error.
    """

    def __init__(
        self,
        benchmarks: list[Benchmark],
        every_n_steps: int = 0,
        at_start: bool = True,
        at_end: bool = True,
        max_samples: int | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        questions_per_batch: int = 64,
        example_rows: int = 6,
        directory: str | None = None,
        on_error: Literal["warn", "raise"] = "warn",
    ) -> None:
        names = [benchmark.name for benchmark in benchmarks]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"BenchmarkEvaluation: benchmarks are {names}; give at least one, and each name once.")
        if every_n_steps < 0 or example_rows < 0:
            raise ValueError(
                f"BenchmarkEvaluation: every_n_steps is {every_n_steps} and example_rows {example_rows}; use 0 or more."
            )
        if questions_per_batch < 1 or (max_samples is not None and max_samples < 1):
            raise ValueError(
                f"BenchmarkEvaluation: questions_per_batch is {questions_per_batch} and max_samples {max_samples}; use "
                "1 or more, or null for all questions."
            )
        if on_error not in ("warn", "raise"):
            raise ValueError(f"BenchmarkEvaluation: on_error is {on_error!r}; choose warn or raise.")
        SamplingOptions(
            1, temperature, 1.0, 1 if max_new_tokens is None else max_new_tokens
        )  # refuses wrong values here
        self.benchmarks = benchmarks
        self.every_n_steps = every_n_steps
        self.at_start = at_start
        self.at_end = at_end
        self.max_samples = max_samples
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.questions_per_batch = questions_per_batch
        self.example_rows = example_rows
        self.directory = directory
        self.on_error = on_error
        self.reports: dict[str, Report] = {}  # of the last evaluation, by name of the benchmark
        self._last_step = -1

    # ---- when -------------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._output = Path(self.directory or (run_directory(trainer) or Path()) / "evaluation")
        if stage in ("fit", "validate"):
            for benchmark in self.benchmarks:
                rank_zero_info(f"Benchmark {benchmark.name}: {len(benchmark.items)} questions")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.at_start and trainer.global_step == 0:
            self.evaluate(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        is_new_step = trainer.global_step != self._last_step and trainer.global_step > 0
        if self.every_n_steps and is_new_step and trainer.global_step % self.every_n_steps == 0:
            self.evaluate(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.at_end and trainer.global_step != self._last_step:
            self.evaluate(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:  # the command, not the validations of a training
            self.evaluate(trainer, pl_module)

    def state_dict(self) -> dict[str, int]:
        return {"last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._last_step = state_dict["last_step"]

    # ---- what -------------------------------------------------------------------------------------------------------

    def evaluate(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Asks all benchmarks, on every rank at the same time."""
        assert isinstance(module, ObserveR1)
        started = time.perf_counter()
        self._last_step = trainer.global_step
        with isolate_rng(), module.evaluating() as engine:
            length = self.max_new_tokens or module.greedy.max_new_tokens
            sampling = SamplingOptions(1, self.temperature, 1.0, length)
            asking = Asking(engine, module.encoder, sampling, module.seed)
            weights = weights_checksum(module.policy.named_weights())
            for benchmark in self.benchmarks:
                self._evaluate(trainer, asking, benchmark, weights)
        module.clock.total["evaluate"] += time.perf_counter() - started

    def _evaluate(self, trainer: L.Trainer, asking: Asking, benchmark: Benchmark, weights: str) -> None:
        name = "validate" if trainer.state.fn == TrainerFn.VALIDATING else f"step-{trainer.global_step:06d}"
        path = self._output / benchmark.name / f"{name}.jsonl"
        positions = spread(len(benchmark.items), self.max_samples)
        header = asking.header(
            benchmark,
            len(positions),
            weights=weights,
            precision=str(trainer.precision),
            questions_per_batch=self.questions_per_batch,
        )
        found = known_answers(path, header, benchmark, asking) if trainer.is_global_zero else {}
        done: dict[int, Prediction] = trainer.strategy.broadcast(found)
        blocks = [block for block in blocks_of(positions, self.questions_per_batch) if not done.keys() >= {*block}]
        known = [done[position] for position in positions if position in done] if trainer.is_global_zero else []
        mine, error = self._ask(trainer, asking, benchmark, blocks, known, header, path)
        # all ranks go on, or none: one alone would wait forever
        if any_rank(error is not None, trainer.strategy.root_device):
            self._fail(trainer, benchmark, error)
            return
        try:
            scores = BenchmarkScores(benchmark).to(trainer.strategy.root_device)
            scores.update(mine)
            figures = scores.compute()  # what it and `gather` raise, they raise on every rank
            self._publish(trainer, benchmark, figures, gather(mine), header, path)
        except Exception as raised:
            self._fail(trainer, benchmark, raised)

    def _ask(
        self,
        trainer: L.Trainer,
        asking: Asking,
        benchmark: Benchmark,
        blocks: Sequence[list[int]],
        known: Sequence[Prediction],
        header: Header,
        path: Path,
    ) -> tuple[list[Prediction], Exception | None]:
        """The answers to this rank's share of the blocks beside those that are known, and what failed."""
        answers: list[Prediction] = []
        with closing(self._with_progress(trainer, benchmark, blocks)) as turns:
            try:
                answers += (prediction.judged_again(benchmark) for prediction in known)
                log = PredictionLog(partial_path(path, trainer.global_rank), header, answers)
                for block in turns:
                    answered = asking.ask(benchmark, block)
                    log.append(answered)
                    answers += answered
            except Exception as raised:
                with suppress(Exception):  # the first error is the one to tell
                    for _ in turns:
                        asking.sit_out()
                return answers, raised
        return answers, None

    def _publish(
        self,
        trainer: L.Trainer,
        benchmark: Benchmark,
        figures: dict[str, float],
        predictions: list[Prediction],
        header: Header,
        path: Path,
    ) -> None:
        """Figures for loggers and checkpoints, on every rank; files, a line and a picture on the first."""
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in figures.items()})
        result = report(benchmark, benchmark.items, Marks.of(predictions, len(benchmark.items)))
        self.reports[benchmark.name] = result
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step)
        if trainer.is_global_zero:
            write_predictions(path, header, predictions)
            path.with_suffix(".json").write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
            for partial in path.parent.glob(f"{path.stem}.rank*.partial"):
                partial.unlink()
            self._show(trainer, benchmark, result, predictions, path.with_suffix(".png"))

    def _with_progress(
        self, trainer: L.Trainer, benchmark: Benchmark, blocks: Sequence[list[int]]
    ) -> Generator[list[int], None, None]:
        """This rank's blocks, with a bar on the first rank."""
        mine = share(blocks, trainer.global_rank, trainer.world_size)
        shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
        # the console of Lightning's own bar, within which this one is drawn
        with Progress(console=get_console(), transient=True, disable=not shown) as progress:
            task = progress.add_task(f"{benchmark.name}, step {trainer.global_step}", total=sum(map(len, mine)))
            for block in mine:
                yield block
                progress.advance(task, len(block))

    def _fail(self, trainer: L.Trainer, benchmark: Benchmark, error: Exception | None) -> None:
        told = "another rank failed, see its output" if error is None else f"{type(error).__name__}: {error}"
        text = f"The evaluation of {benchmark.name} failed: {told}"
        if self.on_error == "raise" or trainer.state.fn == TrainerFn.VALIDATING:
            raise RuntimeError(text) from error
        for callback in trainer.checkpoint_callbacks:
            monitored = getattr(callback, "monitor", None) or ""
            if monitored.startswith(f"{benchmark.name}/"):  # a checkpoint ends the run where it finds no figure at all
                trainer.callback_metrics.setdefault(monitored, torch.tensor(torch.nan))
        if error is not None:  # on the rank that knows
            warnings.warn(f"{text}. The training goes on (BenchmarkEvaluation.on_error is warn).", stacklevel=2)

    def _show(
        self, trainer: L.Trainer, benchmark: Benchmark, result: Report, predictions: Sequence[Prediction], path: Path
    ) -> None:
        """In the terminal and as a picture, on the first rank."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            get_console().print(result.table())
        else:
            rank_zero_info(result.line())
        refused = [prediction for prediction in predictions if prediction.refused is not None]
        if refused:
            rank_zero_warn(
                f"{benchmark.name}: {len(refused)} questions could not be asked and count as wrong, such as "
                f"{refused[0].item.id} ({refused[0].refused})."
            )
        examples = examples_of(predictions, self.example_rows)
        if not examples:
            return
        from PIL import Image

        pairs = [(benchmark.prompt(prediction.position), prediction) for prediction in examples]
        picture = draw_examples(pairs, f"{benchmark.name}, step {trainer.global_step}: {result.headline()}")
        Image.fromarray(picture).save(path)
        log_picture(trainer.loggers, f"{benchmark.name}/examples", picture, trainer.global_step)


def known_answers(path: Path, header: Header, benchmark: Benchmark, asking: Asking) -> dict[int, Prediction]:
    """By position, what an earlier run has answered to the same questions under the same circumstances."""
    try:
        found = answered_before(path, header, benchmark.items)
        asked_as_before = all(asking.asks_as_before(benchmark, earlier) for earlier in list(found.values())[:1])
    except Exception:  # whatever it is, asking meets it too, and there all ranks are told
        return {}
    return found if asked_as_before else {}


def gather(mine: Sequence[Prediction]) -> list[Prediction]:
    """The predictions of all ranks in the order of the questions, each question once."""
    by_position = {prediction.position: prediction for predictions in over_ranks(mine) for prediction in predictions}
    return [by_position[position] for position in sorted(by_position)]
