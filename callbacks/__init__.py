"""Callbacks: what happens around the training."""

from observe_r1.callbacks.benchmark_evaluation import BenchmarkEvaluation
from observe_r1.callbacks.completion_writer import CompletionWriter
from observe_r1.callbacks.display.progress_bar import ProgressLines, RolloutProgressBar
from observe_r1.callbacks.dry_run import DryRun
from observe_r1.callbacks.health import Health
from observe_r1.callbacks.held_out_answers import HeldOutAnswers
from observe_r1.callbacks.hf_export import HFExport
from observe_r1.callbacks.reward_logger import RewardLogger
from observe_r1.callbacks.run_summary import RunSummary
from observe_r1.callbacks.vllm_weight_sync import VLLMWeightSync

__all__ = [
    "BenchmarkEvaluation",
    "CompletionWriter",
    "DryRun",
    "HFExport",
    "Health",
    "HeldOutAnswers",
    "ProgressLines",
    "RewardLogger",
    "RolloutProgressBar",
    "RunSummary",
    "VLLMWeightSync",
]
