"""A started rollout dealt out to another number of ranks: the same completions in every step, each exactly once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from observe_r1.answers import Gold
from observe_r1.dealing import deal, work_of
from observe_r1.experience import Completion, EncodedPrompt, Experience, GroupScores, MicroBatch, Prompt, PromptGroup
from observe_r1.experience_state import from_state, to_state
from observe_r1.micro_batches import assemble, deal_steps, optimizer_steps
from observe_r1.redistribution import redistribute, redistribute_started
from observe_r1.token_cost import TokenCost

GROUP = st.lists(st.integers(1, 30), min_size=3, max_size=3)  # lengths of its completions


def prompt_at(position: int) -> EncodedPrompt:
    tokens = torch.full((5,), position)
    return EncodedPrompt(Prompt(str(position), "", [], [], Gold("3"), position), tokens, tokens)


def group_of(position: int, lengths: list[int]) -> PromptGroup:
    size = len(lengths)
    completions = [
        Completion(torch.full((length,), 100 * position + number), torch.rand(length), f"{position}/{number}")
        for number, length in enumerate(lengths)
    ]
    judged = torch.ones(size, dtype=torch.bool)
    advantage = torch.tensor([(position + number) % 3 - 1.0 for number in range(size)])
    scores = GroupScores({}, torch.rand(size), judged, judged, judged, advantage, 1.0)
    return PromptGroup(prompt_at(position), completions, scores, [c.sampler_logprobs for c in completions])


def trained(batch: MicroBatch) -> Counter[tuple[float, ...]]:
    """(token, length, advantage, sum of log-probs) of each completion that a micro-batch trains; none of a filler."""
    tokens = [completion for part in batch.slices for completion in part.completions]
    assert batch.old_logprobs is not None
    logprobs = [float(part.sum()) for part in batch.old_logprobs.split(batch.lengths.tolist())]
    return Counter(
        (int(token[0]), len(token), float(advantage), logprob)
        for token, advantage, weight, logprob in zip(tokens, batch.advantages, batch.trained, logprobs, strict=True)
        if weight > 0
    )


@given(
    st.lists(st.lists(GROUP, min_size=1, max_size=4), min_size=1, max_size=4),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
)
def test_every_step_keeps_its_completions_and_denominators(
    lengths: list[list[list[int]]], world: int, micro_batches: int, steps: int, skip: bool, balanced: bool
) -> None:
    ranks: list[list[PromptGroup]] = []
    first = 0
    for of_rank in lengths:
        ranks.append([group_of(first + number, of_group) for number, of_group in enumerate(of_rank)])
        first += len(of_rank)
    plan = deal([[work_of(group, TokenCost(), skip) for group in groups] for groups in ranks], steps, micro_batches)
    saved: list[dict[str, Any]] = []
    for rank, groups in enumerate(ranks):
        if balanced:
            received = [ranks[owner][place] for owner, place in map(plan.owners.__getitem__, plan.received(rank))]
            dealt = optimizer_steps(plan, rank, groups, plan.sums, micro_batches, TokenCost()) * 2
        else:
            received = []
            dealt = deal_steps(
                groups, steps=steps, epochs=2, micro_batches=micro_batches, skip_zero_advantage=skip, cost=TokenCost()
            )
        experience = Experience(groups, dealt, {"figure": 1.0}, {"fast": 3}, received)
        saved.append(to_state(experience))
        restored = from_state(saved[-1], prompt_at)
        assert [len(restored.groups), len(restored.received)] == [len(groups), len(received)]
    dealt_again = redistribute(saved, world)
    assert all(state["verdicts"] == {"fast": 3} for state in dealt_again)
    old = [from_state(state, prompt_at) for state in saved]
    new = [from_state(state, prompt_at) for state in dealt_again]
    assert len({len(experience) for experience in (*old, *new)}) == 1
    for step in range(2 * steps):
        numbers = range(step * micro_batches, (step + 1) * micro_batches)
        before = sum((trained(assemble(experience, n)) for experience in old for n in numbers), Counter())
        after = sum((trained(assemble(experience, n)) for experience in new for n in numbers), Counter())
        assert before == after
        assert all(experience.steps[step].totals == old[0].steps[step].totals for experience in new)
        for experience in new:
            assert all(experience.steps[step].micro_batches)  # none is empty
    for state in dealt_again:  # a rank reads the samples it trains, and no others
        used = {g for step in state["steps"] for batch in step["micro_batches"] for g, _ in batch}
        assert used == set(range(len(state["groups"])))


@given(st.integers(1, 20), st.integers(1, 5), st.integers(1, 5))
def test_a_rollout_sampled_ahead_is_dealt_as_if_these_ranks_had_drawn_it(prompts: int, world: int, other: int) -> None:
    def drawn_by(ranks: int) -> list[dict[str, Any]]:
        shares = [list(range(rank, prompts, ranks)) for rank in range(ranks)]
        return [
            {"positions": [7 * n for n in share], "completions": [[f"c{n}"] for n in share], "weights_step": 3}
            for share in shares
        ]

    if prompts < other:
        with pytest.raises(ValueError, match=f"a rollout of {prompts} prompts, too few for {other} ranks"):
            redistribute_started(drawn_by(world), other)
    else:
        assert redistribute_started(drawn_by(world), other) == drawn_by(other)
