"""One rollout from prompts to a scored, dealt-out experience: sampling, rewards, filtering, fixed log-probs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from observe_r1.advantages import AdvantageOptions
from observe_r1.dealing import deal, work_of
from observe_r1.experience import (
    Completion,
    EncodedPrompt,
    Experience,
    MicroBatch,
    PromptGroup,
    StartedRollout,
)
from observe_r1.logprobs import TokenLogprobs
from observe_r1.metrics import rollout_sums
from observe_r1.micro_batches import assemble_step, optimizer_steps
from observe_r1.parcels import pack, unpack
from observe_r1.phase_clock import PhaseClock
from observe_r1.policy import Policy
from observe_r1.ranks import exchange, over_ranks, rank, sum_over_ranks, world_size
from observe_r1.rewards.combination import RewardCombination
from observe_r1.rollout.base import RolloutEngine, SamplingOptions
from observe_r1.scoring import has_advantage, score_groups


@dataclass(frozen=True)
class UpdateOptions:
    """How often a rollout is trained on.

    Args:
        steps_per_rollout: Optimizer steps over one rollout; each sees a share of its groups.
        epochs_per_rollout: Passes over a rollout.
        balance_ranks: Groups travel to where they are trained, so that ranks have about equal work at every
            micro-batch; false: each rank trains on what it sampled, and waits for the one with the longest completions.
    """

    steps_per_rollout: int = 1
    epochs_per_rollout: int = 1
    balance_ranks: bool = True

    def __post_init__(self) -> None:
        if self.steps_per_rollout < 1 or self.epochs_per_rollout < 1:
            raise ValueError(
                f"updates.steps_per_rollout is {self.steps_per_rollout} and updates.epochs_per_rollout "
                f"{self.epochs_per_rollout}: both must be at least 1."
            )


@dataclass(frozen=True)
class FilteringOptions:
    """Which groups and completions are trained on.

    Args:
        zero_variance: Groups without any advantage: `keep` them (they count in the denominators), or `refill` (drop
            them and draw further samples of the ladder, as DAPO's dynamic sampling).
        max_refills: Largest number of refills of a rollout.
        overlong: Completions cut by the length limit: `keep`, or `mask` them out of the loss.
    """

    zero_variance: Literal["keep", "refill"] = "keep"
    max_refills: int = 3
    overlong: Literal["keep", "mask"] = "keep"

    def __post_init__(self) -> None:
        if self.max_refills < 0:
            raise ValueError(f"filtering.max_refills is {self.max_refills}: use 0 or more.")


class PromptSource(Protocol):
    """Where a rollout draws its prompts from, in curriculum order."""

    epoch: int
    position: int  # of the next sample, on all ranks the same

    @property
    def exhausted(self) -> bool:
        """The epoch has no further sample."""
        ...

    def draw(self, count: int) -> list[EncodedPrompt]:
        """This rank's share of the next `count` samples; fewer where samples are skipped or the ladder ends."""
        ...

    def observe(self, groups: Sequence[PromptGroup]) -> None:
        """Called on every rank once what it drew last is scored, with all of it."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, to draw the same samples again."""
        ...


@dataclass(frozen=True)
class CollectedGroups:
    """The scored groups of a rollout that are trained on, and those that were dropped: they have no advantage."""

    groups: list[PromptGroup]
    passed_over: list[PromptGroup]
    sampling_seconds: float  # of the engine, on this rank
    counts: bool = True  # False: this rank kept no group and others did; its only one stands in for them


class RolloutCollector:
    """Makes rollouts: `start`, `finish`, `deal`. Called on every rank at the same time, without gradient.

    Args:
        policy: The model that is trained.
        reference: The frozen model of the KL term; None when there is none, or when it is the policy without adapters.
        needs_reference: There is a KL term.
        processor: Of the prompts, for the engine.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Policy | None,
        needs_reference: bool,
        processor: object,
        engine: RolloutEngine,
        rewards: RewardCombination,
        sampling: SamplingOptions,
        advantage: AdvantageOptions,
        filtering: FilteringOptions,
        updates: UpdateOptions,
        seed: int,
        clock: PhaseClock,
    ) -> None:
        self.policy = policy
        self.reference = reference
        self.needs_reference = needs_reference
        self.engine = engine
        self.rewards = rewards
        self.sampling = sampling
        self.advantage = advantage
        self.filtering = filtering
        self.updates = updates
        self.seed = seed
        self.clock = clock
        self._tokens_trained = 0.0
        try:
            rewards.setup()
            engine.setup(policy, processor)
        except AttributeError as error:  # torch would take it for an attribute that the module lacks, and drop it
            raise RuntimeError(f"A reward or the rollout engine could not be set up: {error}") from error

    def start(self, source: PromptSource, count: int, weights_step: int) -> StartedRollout:
        """Draws the next `count` samples and has their completions sampled, with the weights the engine has now."""
        seed = rollout_seed(self.seed, source.epoch, source.position, rank())
        state = source.state_dict()
        with self.clock.measure("data"):
            prompts = source.draw(count)
        with self.clock.measure("generate"):
            prompts = self.policy.encode_images(prompts)
            sampled = self.engine.begin(prompts, self.sampling, seed)
        return StartedRollout(prompts, sampled, count, weights_step, state)

    def finish(self, rollout: StartedRollout, source: PromptSource) -> CollectedGroups:
        """Waits for a started rollout and scores it; refills it, if that is asked for, with the same weights."""
        kept: list[PromptGroup] = []
        dropped: list[PromptGroup] = []
        refills = self.filtering.max_refills if self.filtering.zero_variance == "refill" else 0
        asked_for, seconds = rollout.asked_for, 0.0
        missing = asked_for
        while True:
            with self.clock.measure("generate"):
                sampled = rollout.sampled.result()
            seconds += sampled.seconds
            scored = self._score(rollout.prompts, sampled.completions, self.clock)
            source.observe(scored)
            if self.filtering.zero_variance == "keep":
                return CollectedGroups(scored, [], seconds)
            kept += [group for group in scored if has_advantage(group)]
            dropped += [group for group in scored if not has_advantage(group)]
            counts = torch.tensor([len(scored), sum(map(has_advantage, scored))], dtype=torch.float64)
            drawn, useful = self._over_ranks(counts).tolist()
            missing, refills = missing - int(useful), refills - 1
            if missing <= 0 or drawn == 0 or refills < 0:
                break
            rollout = self.start(source, missing, rollout.weights_step)
        if kept:
            return CollectedGroups(kept, dropped, seconds)
        # a rank without any group would lose the others: one without advantage keeps it with them
        return CollectedGroups(dropped[:1], dropped[1:], seconds, counts=missing == asked_for)

    def deal(self, collected: CollectedGroups, micro_batches: int) -> Experience:
        """Deals groups out to the optimizer steps and fixes the log-probs they are compared with.

        Args:
            collected: By `finish`.
            micro_batches: Of one optimizer step.
        """
        experience = self._dealt(collected, micro_batches)
        steps = experience.steps
        distinct_steps = self.updates.steps_per_rollout
        if len(steps) > 1:
            with self.clock.measure("old_logprobs"):
                store_logprobs(experience, "old_logprobs", self._policy_logprobs, distinct_steps)
        if self.needs_reference:
            at_hand = nullcontext() if self.reference is None else self.reference.at_hand()
            with self.clock.measure("reference_logprobs"), at_hand:
                store_logprobs(experience, "reference_logprobs", self._reference_logprobs, distinct_steps)
        experience.verdicts = dict(sum(over_ranks(self.rewards.take_counts()), Counter()))
        experience.metrics = self._figures(experience, collected)
        self._tokens_trained = sum(step.totals.forwarded_tokens for step in steps) / world_size()
        return experience

    def _dealt(self, collected: CollectedGroups, micro_batches: int) -> Experience:
        """What each rank trains: the groups it sampled, or where ranks are balanced, those that the plan gives it."""
        groups, updates = collected.groups, self.updates
        cost, skips = self.policy.token_cost(), not self.needs_reference
        works = [work_of(group, cost, skips) for group in groups if collected.counts]
        if world_size() == 1 or not updates.balance_ranks:
            plan = deal([works], updates.steps_per_rollout, micro_batches)
            steps = optimizer_steps(plan, 0, groups, self._over_ranks(plan.sums), micro_batches, cost)
            return Experience(groups, steps * updates.epochs_per_rollout)
        with self.clock.measure("exchange"):
            plan = deal(over_ranks(works), updates.steps_per_rollout, micro_batches)
            parcels = [pack([groups[g] for g in sent]) for sent in plan.sent(rank())]
            received = [group for parcel in exchange(parcels, self.policy.device) for group in unpack(parcel)]
        steps = optimizer_steps(plan, rank(), groups, plan.sums, micro_batches, cost)
        return Experience(groups, steps * updates.epochs_per_rollout, received=received)

    def sample(
        self, prompts: list[EncodedPrompt], sampling: SamplingOptions, seed: int, clock: PhaseClock
    ) -> list[PromptGroup]:
        """Completions of the prompts, scored."""
        with clock.measure("generate"):
            completions = self.engine.take_part(prompts, sampling, seed)
        return self._score(prompts, completions, clock)

    def close(self) -> None:
        self.rewards.close()
        self.engine.close()

    def _score(
        self, prompts: list[EncodedPrompt], completions: list[list[Completion]], clock: PhaseClock
    ) -> list[PromptGroup]:
        groups = [PromptGroup(prompt, group) for prompt, group in zip(prompts, completions, strict=True)]
        with clock.measure("reward"):
            score_groups(groups, self.rewards, self.advantage, self.filtering.overlong)
        return groups

    def _over_ranks(self, values: Tensor) -> Tensor:
        return sum_over_ranks(values, self.policy.device)

    def _policy_logprobs(self, batch: MicroBatch) -> Tensor:
        output: TokenLogprobs = self.policy(batch.to(self.policy.device).slices, self.sampling.temperature)
        return output.logprobs

    def _reference_logprobs(self, batch: MicroBatch) -> Tensor:
        if self.reference is None:
            with self.policy.adapters_off():
                return self._policy_logprobs(batch)
        output: TokenLogprobs = self.reference(batch.to(self.policy.device).slices, self.sampling.temperature)
        return output.logprobs

    def _figures(self, experience: Experience, collected: CollectedGroups) -> dict[str, float]:
        """What is logged about the rollout, over all ranks; times are this rank's, since the rollout before.

        `seconds/train` is of the rollout before: this one has yet to be trained on.
        """
        groups = [*experience.groups, *collected.passed_over]
        sums = rollout_sums(groups)
        sums["rollout/refilled_groups"] = (float(len(collected.passed_over)), 1.0 / world_size())
        sums["speed/generated_tokens"] = (float(sum(len(c) for g in groups for c in g.completions)), 1.0)
        added = self._over_ranks(torch.tensor(list(sums.values()), dtype=torch.float64)).tolist()
        figures = {name: total / count for name, (total, count) in zip(sums, added, strict=True) if count}
        seconds = dict(self.clock.last)
        # sampling may have gone on beside training: `seconds/generate` is what was waited for
        figures["speed/generated_tokens_per_second"] = (
            figures.pop("speed/generated_tokens") / collected.sampling_seconds
        )
        if self._tokens_trained and seconds.get("train"):  # not known of a rollout that a resumed run went on with
            figures["speed/trained_tokens_per_second"] = self._tokens_trained / seconds["train"]
        self.clock.restart()
        return figures | {f"seconds/{phase}": value for phase, value in seconds.items()}


def rollout_seed(seed: int, epoch: int, position: int, rank: int) -> int:
    """Seed of the sampling of one rollout. Depends on nothing that a resumed run does not know."""
    return int(np.random.SeedSequence([seed, epoch, position, rank]).generate_state(1)[0])


def store_logprobs(
    experience: Experience,
    field: Literal["old_logprobs", "reference_logprobs"],
    logprobs_of: Callable[[MicroBatch], Tensor],
    distinct_steps: int,
) -> None:
    """Computes log-probs of every completion that will be trained and stores them on its group.

    `distinct_steps` are the steps of the first epoch over the rollout; later epochs repeat them.

    Runs micro-batch by micro-batch as they will be trained: with another packing, half precision would move the ratio
    off 1 before the first step.
    """
    groups = experience.trained_groups
    filled: list[list[Tensor]] = [
        [torch.zeros(len(completion)) for completion in group.completions] for group in groups
    ]
    for step in experience.steps[:distinct_steps]:
        for index, assignment in enumerate(step.micro_batches):
            batch = assemble_step(groups, step, index)
            # fillers too: under sharded strategies every rank has to call the model equally often
            values = logprobs_of(batch).float().cpu()
            if index in step.fillers:
                continue
            items = [(g, c) for g, completions in assignment for c in completions]
            for (g, c), value in zip(items, values.split(batch.lengths.tolist()), strict=True):
                filled[g][c] = value.clone()  # a view would be saved with the whole micro-batch behind it
    for group, values_of_group in zip(groups, filled, strict=True):
        setattr(group, field, values_of_group)
