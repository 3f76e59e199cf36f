"""The figures of a benchmark as a TorchMetrics metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor
from torchmetrics import Metric

from observe_r1.evaluation.benchmark import Benchmark
from observe_r1.evaluation.predictions import Prediction
from observe_r1.evaluation.report import Marks, Report, marks_of, report


class BenchmarkScores(Metric):
    """Figures of the answers to a benchmark, exact under any number of ranks.

    Every question has a place of its own in the states, so an answer that several ranks give counts once. States are
    integers, because a module in half precision casts float states. `compute` gives figures by logging name.
    """

    full_state_update = False

    def __init__(self, benchmark: Benchmark) -> None:
        super().__init__()
        self.benchmark = benchmark
        for column in fields(Marks):
            places = torch.zeros(len(benchmark.items), dtype=torch.long)
            self.add_state(column.name, places, dist_reduce_fx="max")

    def update(self, predictions: Sequence[Prediction]) -> None:
        """Adds answers."""
        if not predictions:
            return
        places = torch.tensor([prediction.position for prediction in predictions], device=self.device)
        marks = [marks_of(prediction) for prediction in predictions]
        for column in fields(Marks):
            state: Tensor = getattr(self, column.name)
            state[places] = torch.tensor([mark[column.name] for mark in marks], device=self.device)

    def report(self) -> Report:
        """Of the answers of this rank; of all ranks within `compute`."""
        marks = Marks(**{column.name: getattr(self, column.name).tolist() for column in fields(Marks)})
        return report(self.benchmark, self.benchmark.items, marks)

    def compute(self) -> dict[str, float]:
        return self.report().figures()
