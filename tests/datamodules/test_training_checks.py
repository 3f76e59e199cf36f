"""Sizes that several ranks have to agree on; those of one are in tests/mistakes."""

from __future__ import annotations

import pytest

from observe_r1.datamodules.training_checks import check_training
from observe_r1.loading import PolicyOptions, load_policy
from observe_r1.module import ObserveR1
from observe_r1.rollout import SamplingOptions


def test_ranks_share_a_rollout_evenly_and_have_something_to_train_on() -> None:
    module = ObserveR1(PolicyOptions("quickstart"), sampling=SamplingOptions(group_size=2, max_new_tokens=16))
    module.policy = load_policy(module.policy_options)
    check_training(module, prompts_per_rollout=6, ranks=3, micro_batches=4)
    with pytest.raises(ValueError, match=r"prompts_per_rollout is 8, which 3 ranks .* multiple of 3"):
        check_training(module, prompts_per_rollout=8, ranks=3, micro_batches=1)
    with pytest.raises(ValueError, match=r"4 completions on a rank \(2 prompts × 2\), fewer than the 5 micro-batches"):
        check_training(module, prompts_per_rollout=6, ranks=3, micro_batches=5)
