"""What is measured of rollouts and of the held-out split."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from observe_r1.answers import is_well_formed
from observe_r1.experience import MicroBatch, PromptGroup
from observe_r1.objective import ObjectiveTerms, TokenBatch, kl_estimate

LEVELS = 9  # difficulties are eighths: 0, 1/8 ... 1


def level_of(difficulty: float | None) -> int | None:
    """Number of the nearest eighth, or None where the difficulty was never measured."""
    return None if difficulty is None else round(min(1.0, max(0.0, difficulty)) * (LEVELS - 1))


def level_name(level: int) -> str:
    """Name of a level in logs, such as `0.375`."""
    return f"{level / (LEVELS - 1):.3f}"


def rollout_sums(groups: Sequence[PromptGroup]) -> dict[str, tuple[float, float]]:
    """(sum, count) of every figure of a rollout by logging name, so that ranks can add theirs up exactly.

    The names depend on the rewards only, not on the groups. Figures without any observation have count 0.
    """
    scores = [group.scores for group in groups if group.scores is not None]
    assert scores, "figures of a rollout need scored groups"
    completions = [completion for group in groups for completion in group.completions]
    count = float(len(completions))

    def over_completions(values: list[Tensor]) -> tuple[float, float]:
        return float(torch.cat(values).double().sum()), count

    sums = {
        "rollout/reward": over_completions([score.reward for score in scores]),
        "rollout/pass_rate": (
            float(sum(int(score.correct.sum()) for score in scores)),
            float(sum(int(score.judged.sum()) for score in scores)),
        ),
        "rollout/length": (float(sum(len(c) for c in completions)), count),
        "rollout/truncated": (float(sum(c.truncated for c in completions)), count),
        "rollout/left_out": over_completions([~score.trained for score in scores]),
        "rollout/wasted_groups": (float(sum(not bool(s.advantage.any()) for s in scores)), float(len(scores))),
        "rollout/dynamic_weight": (sum(score.weight for score in scores), float(len(scores))),
    }
    for part in scores[0].parts:
        sums[f"reward/{part}"] = over_completions([score.parts[part] for score in scores])
    for level in range(LEVELS):
        at_level = [
            group.scores
            for group in groups
            if group.scores is not None and level_of(group.prompt.prompt.difficulty) == level
        ]
        sums[f"pass_rate_by_level/{level_name(level)}"] = (
            float(sum(int(score.correct.sum()) for score in at_level)),
            float(sum(int(score.judged.sum()) for score in at_level)),
        )
    return sums


def step_sums(
    batch: MicroBatch, tokens: TokenBatch, terms: ObjectiveTerms, loss: Tensor, entropy: Tensor | None
) -> dict[str, Tensor]:
    """What a micro-batch adds to the figures of its optimizer step: means over the tokens that passed the model.

    `kl` is the k3 estimate against the reference, whatever estimator trains. `sampler_mismatch` is the mean distance of
    the sampler's log-probs from the trainer's, the first thing to look at when a run goes wrong.
    """
    share = 0.0 if batch.is_filler else 1.0 / batch.totals.forwarded_tokens
    new, old = tokens.logprobs.detach(), tokens.old_logprobs
    sums = {
        "train/loss": loss.detach(),
        "train/clip_fraction": terms.clipped.sum() * share,
        "train/log_ratio": (new - old).abs().sum() * share,
        "train/sampler_mismatch": (old - batch.sampler_logprobs).abs().sum() * share,
    }
    if entropy is not None:
        sums["train/entropy"] = entropy.sum() * share
    if batch.reference_logprobs is not None:
        sums["train/kl"] = kl_estimate(new, batch.reference_logprobs, "k3").sum() * share
    return sums


class PassRate(Metric):
    """Share of correct answers, overall and by difficulty level; exact under any number of ranks.

    `compute` gives `{"pass_rate": ..., "pass_rate/0.125": ...}` with the levels that occurred, and the format rate and
    mean length of the same answers.
    """

    full_state_update = False
    correct: Tensor
    total: Tensor
    well_formed: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        # integers, because a module in half precision casts float states, and bf16 cannot count beyond 256;
        # the last row counts samples of unknown difficulty
        for name, size in (("correct", LEVELS + 1), ("total", LEVELS + 1), ("well_formed", 1), ("tokens", 1)):
            self.add_state(name, torch.zeros(size, dtype=torch.long), dist_reduce_fx="sum")

    def update(
        self, difficulties: Sequence[float | None], correct: Tensor, well_formed: Tensor, lengths: Tensor
    ) -> None:
        """Adds answers: one difficulty each, [N] bool correct and well_formed, [N] lengths in tokens."""
        levels = [level_of(difficulty) for difficulty in difficulties]
        chosen = [LEVELS if level is None else level for level in levels]
        rows = torch.tensor(chosen, dtype=torch.long, device=self.correct.device)  # also of none
        self.correct.index_add_(0, rows, correct.to(self.correct))
        self.total.index_add_(0, rows, torch.ones_like(rows))
        self.well_formed += well_formed.to(self.well_formed).sum()
        self.tokens += lengths.to(self.tokens).sum()

    def add(self, answers: Sequence[PromptGroup]) -> None:
        """Adds scored answers, one to each question; those that nobody can judge are left out."""
        judged = [(group, group.scores) for group in answers if group.scores is not None and group.scores.judged.all()]
        self.update(
            [group.prompt.prompt.difficulty for group, _ in judged],
            torch.tensor([bool(scores.correct[0]) for _, scores in judged]),
            torch.tensor([is_well_formed(group.completions[0].text) for group, _ in judged]),
            torch.tensor([len(group.completions[0]) for group, _ in judged]),
        )

    def compute(self) -> dict[str, Tensor]:
        answers = self.total.sum()
        if not bool(answers):
            return {}
        result = {
            "pass_rate": self.correct.sum() / answers,
            "format_rate": self.well_formed.sum() / answers,
            "length": self.tokens.sum() / answers,
        }
        for level in range(LEVELS):
            if bool(self.total[level]):
                result[f"pass_rate_by_level/{level_name(level)}"] = self.correct[level] / self.total[level]
        return {name: value.float() for name, value in result.items()}
