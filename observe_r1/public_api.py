"""What your code may import and rely on.

Releases with the same second number keep these names, their parameters and what they mean; a change is announced in
CHANGELOG.md one release before. So do the keys of YAML configurations, which are these parameters, the options of the
command line, and the formats of ladders, predictions and checkpoints, each of which has a version of its own. Whatever
is not listed here may change with any release.
"""

from __future__ import annotations

PUBLIC: dict[str, tuple[str, ...]] = {
    # training
    "observe_r1.module": ("ObserveR1",),
    "observe_r1.datamodules": ("NeuraLadderDataModule", "QuickstartDataModule"),
    "observe_r1.callbacks": (
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
    ),
    "observe_r1.schedules": ("WarmupCosine",),
    "observe_r1.strategies": ("DeepSpeed", "FSDP2"),
    "observe_r1.export": ("export_checkpoint",),
    # options, the sections of a configuration
    "observe_r1.loading": ("LoraOptions", "PolicyOptions"),
    "observe_r1.encoding": ("PromptOptions",),
    "observe_r1.advantages": ("AdvantageOptions",),
    "observe_r1.objective": ("ImportanceOptions", "KLOptions", "ObjectiveOptions"),
    "observe_r1.collection": ("FilteringOptions", "UpdateOptions"),
    "observe_r1.ladder.adaptive": ("AdaptiveOptions",),
    "observe_r1.ladder.storage": ("RemoteOptions",),
    # what own rewards, engines and callbacks are given
    "observe_r1.experience": (
        "Completion",
        "EncodedPrompt",
        "Experience",
        "GroupScores",
        "Prompt",
        "PromptGroup",
        "Skipped",
    ),
    "observe_r1.answers": ("Gold",),
    # to derive from
    "observe_r1.rewards": (
        "AccuracyReward",
        "AnswerVerifier",
        "CorrectnessReward",
        "FormatReward",
        "OverlongPenalty",
        "Reward",
    ),
    "observe_r1.health.rule": ("Reading", "Rule"),
    "observe_r1.rollout": ("HFRollout", "RolloutEngine", "SamplingOptions", "VLLMLocalRollout", "VLLMServerRollout"),
    "observe_r1.evaluation": (
        "Benchmark",
        "Item",
        "Judgement",
        "MMMU",
        "MathVista",
        "Outcome",
        "ParquetBenchmark",
        "Verdict",
    ),
    "observe_r1.logprobs": ("sampling_logprobs",),  # the distribution that engines sample from
    # ladders
    "observe_r1.ladder.reader": ("LadderDataset",),
    "observe_r1.ladder.shards": ("write_ladder",),
}
