"""Benchmarks: questions, scoring that equals the official code, and what is reported of it."""

from observe_r1.evaluation.benchmark import Benchmark, extract
from observe_r1.evaluation.item import Item, Judgement, Outcome, Verdict
from observe_r1.evaluation.mathvista import MathVista
from observe_r1.evaluation.mmmu import MMMU
from observe_r1.evaluation.parquet_benchmark import ParquetBenchmark
from observe_r1.evaluation.tally import Tally, wilson_interval

__all__ = [
    "MMMU",
    "Benchmark",
    "Item",
    "Judgement",
    "MathVista",
    "Outcome",
    "ParquetBenchmark",
    "Tally",
    "Verdict",
    "extract",
    "wilson_interval",
]
