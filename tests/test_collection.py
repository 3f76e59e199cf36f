"""From prompts to an experience: scores, refills, what is left out, and the fixed log-probs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from PIL import Image

from observe_r1.advantages import AdvantageOptions
from observe_r1.answers import Gold
from observe_r1.collection import FilteringOptions, RolloutCollector, UpdateOptions, rollout_seed
from observe_r1.encoding import PromptEncoder, PromptOptions
from observe_r1.experience import Completion, EncodedPrompt, GroupSlice, Prompt, PromptGroup
from observe_r1.experience_state import from_state, to_state
from observe_r1.loading import LoraOptions, PolicyOptions, load_policy, load_processor, load_reference
from observe_r1.micro_batches import assemble
from observe_r1.phase_clock import PhaseClock
from observe_r1.policy import Policy
from observe_r1.rewards import AccuracyReward, FormatReward, RewardCombination
from observe_r1.rollout import RolloutEngine, SamplingOptions
from observe_r1.scoring import score_groups

OPTIONS = PolicyOptions("quickstart", gradient_checkpointing=False)


def response(answer: str, padding: int = 0) -> str:
    return f"<observe>o</observe><think>t {'x ' * padding}</think><answer>{answer}</answer>"


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy(OPTIONS)


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    return PromptEncoder(load_processor("quickstart", PromptOptions()), PromptOptions(system_prompt=None))


class Recited(RolloutEngine):
    """Recites given answers instead of sampling, so that a test decides who is right."""

    def __init__(self, encoder: PromptEncoder, answers: dict[int, Sequence[str]], truncated: bool = False) -> None:
        self.encoder = encoder
        self.answers = answers
        self.truncated = truncated
        self.seeds: list[int] = []

    def generate(
        self, prompts: Sequence[EncodedPrompt], sampling: SamplingOptions, seed: int
    ) -> list[list[Completion]]:
        self.seeds.append(seed)
        return [[self.completion(answer) for answer in self.answers[p.prompt.position]] for p in prompts]

    def completion(self, answer: str) -> Completion:
        text = response(answer)
        tokens = torch.tensor(self.encoder.tokenizer(text)["input_ids"])
        return Completion(tokens, torch.zeros(len(tokens)), text, truncated=self.truncated and answer == "9")


class Questions:
    """A ladder of `size` questions whose gold is always 3."""

    def __init__(self, encoder: PromptEncoder, size: int, gold: str = "3") -> None:
        self.epoch, self.position = 0, 0
        self.observed: list[int] = []
        image = Image.new("RGB", (112, 112), "white")
        messages = [{"role": "user", "content": [{"type": "image", "index": 0}, {"type": "text", "text": "How many?"}]}]
        prompts = [Prompt(str(n), "", messages, [image], Gold(gold), n, difficulty=0.5) for n in range(size)]
        encoded = [encoder.encode(prompt) for prompt in prompts]
        self.prompts = [prompt for prompt in encoded if isinstance(prompt, EncodedPrompt)]

    def draw(self, count: int) -> list[EncodedPrompt]:
        drawn = self.prompts[self.position : self.position + count]
        self.position += len(drawn)
        return drawn

    def observe(self, groups: Sequence[PromptGroup]) -> None:
        self.observed += [group.prompt.prompt.position for group in groups]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}


def collector_of(policy: Policy, engine: RolloutEngine, **changes: Any) -> RolloutCollector:
    arguments: dict[str, Any] = {
        "reference": None,
        "needs_reference": False,
        "processor": None,
        "engine": engine,
        "rewards": RewardCombination([FormatReward(0.5), AccuracyReward()]),
        "sampling": SamplingOptions(group_size=4, max_new_tokens=32),
        "advantage": AdvantageOptions(),
        "filtering": FilteringOptions(),
        "updates": UpdateOptions(),
        "seed": 7,
        "clock": PhaseClock(),
    }
    return RolloutCollector(policy, **{**arguments, **changes})


MIXED, RIGHT, WRONG = ("3", "3", "9", "9"), ("3",) * 4, ("9",) * 4


def collect(collector: RolloutCollector, source: Questions, count: int = 2, micro_batches: int = 1) -> Any:
    with torch.no_grad():
        collected = collector.finish(collector.start(source, count, weights_step=0), source)
        return collector.deal(collected, micro_batches) if collected.groups else None


def test_scores_match_the_recipe_computed_by_hand(policy: Policy, encoder: PromptEncoder) -> None:
    texts = [response("3", 120), response("3", 150), response("9"), "no tags at all 3"]
    completions = [Completion(torch.arange(len(t.split()) + 100), torch.zeros(0), t) for t in texts]
    group = PromptGroup(Questions(encoder, 1).prompts[0], completions)
    score_groups([group], RewardCombination([FormatReward(0.5), AccuracyReward()]), AdvantageOptions(), "keep")
    assert group.scores is not None
    rewards = [1 + 0.5 + 0.2, 1 + 0.5, 0.5, 0.0]  # the shorter right answer is longer than 100 tokens
    deviation = statistics.stdev(rewards)
    weight = 4 * 1.8 * 0.5 * 0.5
    expected = [weight * (r - statistics.fmean(rewards)) / (deviation + 1e-9) for r in rewards]
    assert group.scores.reward.tolist() == pytest.approx(rewards)
    assert group.scores.advantage.tolist() == pytest.approx(expected, rel=1e-6)
    assert group.scores.correct.tolist() == [True, True, False, False]
    assert group.scores.weight == pytest.approx(1.8)


def test_a_gold_that_cannot_be_judged_is_left_out_and_counted(policy: Policy, encoder: PromptEncoder) -> None:
    rewards = RewardCombination([FormatReward(0.5), AccuracyReward()])
    collector = collector_of(policy, Recited(encoder, {0: MIXED, 1: MIXED}), rewards=rewards)
    experience = collect(collector, Questions(encoder, 2, gold=r"\frac{1}{"))
    assert not any(bool(group.scores.trained.any()) for group in experience.groups)
    assert not any(bool(group.scores.advantage.any()) for group in experience.groups)
    assert experience.verdicts["unparseable_gold"] == 8
    assert "rollout/pass_rate" not in experience.metrics  # nobody can say
    assert float(assemble(experience, 0).trained.sum()) == 0


def test_overlong_completions_are_masked_on_demand(policy: Policy, encoder: PromptEncoder) -> None:
    for overlong, expected in (("keep", 8.0), ("mask", 4.0)):
        engine = Recited(encoder, {0: MIXED, 1: MIXED}, truncated=True)
        filtering = FilteringOptions(overlong=overlong)  # type: ignore[arg-type]
        experience = collect(collector_of(policy, engine, filtering=filtering), Questions(encoder, 2))
        assert experience.steps[0].totals.sequences == expected
        assert float(assemble(experience, 0).trained.sum()) == expected


def test_groups_without_advantage_are_kept_in_the_denominator_but_not_forwarded(
    policy: Policy, encoder: PromptEncoder
) -> None:
    experience = collect(collector_of(policy, Recited(encoder, {0: RIGHT, 1: MIXED})), Questions(encoder, 2))
    totals = experience.steps[0].totals
    assert (totals.sequences, totals.forwarded_tokens) == (8, totals.tokens / 2)
    assert [part.prompt.prompt.position for part in assemble(experience, 0).slices] == [1]
    assert experience.metrics["rollout/wasted_groups"] == 0.5


def test_refills_replace_groups_without_advantage(policy: Policy, encoder: PromptEncoder) -> None:
    engine = Recited(encoder, {0: RIGHT, 1: MIXED, 2: WRONG, 3: MIXED, 4: MIXED})
    source = Questions(encoder, 5)
    experience = collect(collector_of(policy, engine, filtering=FilteringOptions("refill", 3)), source)
    assert [group.prompt.prompt.position for group in experience.groups] == [1, 3]
    assert source.position == 4
    assert source.observed == [0, 1, 2, 3]  # those that are dropped, too: they say most about the pass rate
    assert experience.metrics["rollout/refilled_groups"] == 2
    assert experience.metrics["rollout/pass_rate"] == pytest.approx((1 + 0.5 + 0 + 0.5) / 4)
    assert len(set(engine.seeds)) == 3


def test_refills_are_bounded_and_never_leave_a_rank_without_work(policy: Policy, encoder: PromptEncoder) -> None:
    engine = Recited(encoder, dict.fromkeys(range(20), WRONG))
    source = Questions(encoder, 20)
    experience = collect(collector_of(policy, engine, filtering=FilteringOptions("refill", 2)), source)
    assert source.position == 6
    assert len(experience.groups) == 1
    batch = assemble(experience, 0)
    assert len(batch.lengths) > 0
    assert not bool((batch.advantages * batch.trained).any())


def test_fewer_groups_than_steps_are_shared_out_by_completions(policy: Policy, encoder: PromptEncoder) -> None:
    engine = Recited(encoder, {0: MIXED, 1: MIXED})
    experience = collect(
        collector_of(policy, engine, updates=UpdateOptions(steps_per_rollout=4)), Questions(encoder, 2)
    )
    assert [step.totals.sequences for step in experience.steps] == [2.0] * 4
    trained = [item for step in experience.steps for batch in step.micro_batches for item in batch]
    assert trained == [(0, [0, 1]), (0, [2, 3]), (1, [0, 1]), (1, [2, 3])]


def test_the_end_of_the_ladder_ends_the_epoch(policy: Policy, encoder: PromptEncoder) -> None:
    collector = collector_of(policy, Recited(encoder, {0: MIXED}))
    source = Questions(encoder, 1)
    assert len(collect(collector, source).groups) == 1
    assert collect(collector, source) is None


def test_old_and_reference_logprobs_are_those_of_the_models(policy: Policy, encoder: PromptEncoder) -> None:
    other = load_reference(OPTIONS)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.05)
    engine = Recited(encoder, dict.fromkeys(range(4), MIXED))
    collector = collector_of(
        policy, engine, reference=other, needs_reference=True, updates=UpdateOptions(steps_per_rollout=2)
    )
    experience = collect(collector, Questions(encoder, 4), count=4, micro_batches=3)
    for group in experience.groups:
        slices = [GroupSlice(group.prompt, [c.token_ids for c in group.completions])]
        with torch.no_grad():
            expected = [model(slices, 1.0).logprobs for model in (policy, other)]
        torch.testing.assert_close(torch.cat(group.old_logprobs), expected[0], rtol=0, atol=2e-5)
        torch.testing.assert_close(torch.cat(group.reference_logprobs), expected[1], rtol=0, atol=2e-5)
    assert len(experience) == 6


def test_one_step_per_rollout_needs_no_old_logprobs(policy: Policy, encoder: PromptEncoder) -> None:
    experience = collect(collector_of(policy, Recited(encoder, {0: MIXED, 1: MIXED})), Questions(encoder, 2))
    assert all(group.old_logprobs is None for group in experience.groups)
    assert assemble(experience, 0).old_logprobs is None


def test_an_experience_survives_its_state(policy: Policy, encoder: PromptEncoder, tmp_path: Any) -> None:
    source = Questions(encoder, 4)
    engine = Recited(encoder, dict.fromkeys(range(4), MIXED))
    collector = collector_of(policy, engine, updates=UpdateOptions(2, 2))
    experience = collect(collector, source, count=4, micro_batches=2)
    torch.save(to_state(experience), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)  # nothing in it needs unpickling
    restored = from_state(loaded, lambda position: source.prompts[position])
    assert len(restored) == len(experience) == 8
    for number in range(len(experience)):
        one, other = assemble(experience, number), assemble(restored, number)
        assert one.totals == other.totals
        for field in ("lengths", "advantages", "trained", "sampler_logprobs", "old_logprobs"):
            assert torch.equal(getattr(one, field), getattr(other, field))
        assert all(
            torch.equal(a, b)
            for x, y in zip(one.slices, other.slices, strict=True)
            for a, b in zip(x.completions, y.completions, strict=True)
        )


def test_adapters_train_alone_and_their_base_is_the_reference(encoder: PromptEncoder) -> None:
    pytest.importorskip("peft")
    options = PolicyOptions("quickstart", gradient_checkpointing=True, lora=LoraOptions(rank=4, alpha=8))
    adapted = load_policy(options)
    assert {name.split(".")[-3] for name, p in adapted.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    engine = Recited(encoder, {0: MIXED, 1: MIXED})
    collector = collector_of(adapted, engine, needs_reference=True, updates=UpdateOptions(2))
    experience = collect(collector, Questions(encoder, 2))
    base = load_policy(OPTIONS)
    for group in experience.groups:
        slices = [GroupSlice(group.prompt, [c.token_ids for c in group.completions])]
        with torch.no_grad():
            expected = base(slices, 1.0).logprobs
        torch.testing.assert_close(torch.cat(group.reference_logprobs), expected, rtol=0, atol=2e-5)
        assert float((torch.cat(group.old_logprobs) - expected).abs().max()) > 1e-3


def test_seeds_differ_by_every_part() -> None:
    seeds = {rollout_seed(*parts) for parts in ((0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1))}
    assert len(seeds) == 5
    assert rollout_seed(3, 1, 64, 2) == rollout_seed(3, 1, 64, 2)
    assert all(0 <= seed < 2**32 and math.isfinite(seed) for seed in seeds)
