"""Rollout engines: where completions come from."""

from observe_r1.rollout.base import RolloutEngine, SamplingOptions
from observe_r1.rollout.hf import HFRollout
from observe_r1.rollout.vllm_local import VLLMLocalRollout
from observe_r1.rollout.vllm_server import VLLMServerRollout

__all__ = ["HFRollout", "RolloutEngine", "SamplingOptions", "VLLMLocalRollout", "VLLMServerRollout"]
