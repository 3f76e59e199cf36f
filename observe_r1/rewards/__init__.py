"""Rewards: how completions are scored. Importing this package imports no torch."""

from observe_r1.rewards.accuracy import AccuracyReward, gold_problems
from observe_r1.rewards.base import CorrectnessReward, Reward
from observe_r1.rewards.combination import CombinedScores, RewardCombination
from observe_r1.rewards.format import FormatReward
from observe_r1.rewards.overlong import OverlongPenalty
from observe_r1.rewards.verification import AnswerVerifier, Comparison, Verdict

__all__ = [
    "AccuracyReward",
    "AnswerVerifier",
    "CombinedScores",
    "Comparison",
    "CorrectnessReward",
    "FormatReward",
    "OverlongPenalty",
    "Reward",
    "RewardCombination",
    "Verdict",
    "gold_problems",
]
