"""Rollout engines: where completions come from."""

from observe_r1.rollout.base import RolloutEngine, SamplingOptions
from observe_r1.rollout.hf import HFRollout

__all__ = ["HFRollout", "RolloutEngine", "SamplingOptions"]
