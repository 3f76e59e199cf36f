"""Rules on figures written down here: at their limits, and where something else than a sickness moves them."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from observe_r1.health.completions import LengthCollapse, LengthExplosion, RewardHacking, Templated
from observe_r1.health.optimisation import EntropyCollapse, GradientSpikes, KLBlowUp, NonFinite
from observe_r1.health.rule import Figures, Memory, Reading, Rule
from observe_r1.health.samples import SamplerMismatch, SkippedSamples, VerificationFailing, ZeroAdvantages
from observe_r1.health.trends import follow
from observe_r1.health.watch import Watch


def turns(rule: Rule, series: Iterable[Figures]) -> list[tuple[int, bool]]:
    """(number of the figures, begins) of every event."""
    watch = Watch([rule])
    return [(number, event.begins) for number, figures in enumerate(series) for event in watch.observe(number, figures)]


def of(name: str, values: Iterable[float]) -> list[Figures]:
    return [{name: value} for value in values]


STEADY = [1.0] * 30
SICK: dict[str, tuple[Rule, list[Figures], list[bool]]] = {
    "kl": (KLBlowUp(), of("train/kl", [0.01] * 10 + [4.0] * 10), [True]),
    "kl, and well again": (KLBlowUp(), of("train/kl", [4.0] * 10 + [0.1] * 20), [True, False]),
    "a single large kl": (KLBlowUp(), of("train/kl", [0.01] * 10 + [4e6] + [0.01] * 20), []),
    "kl between the limits stays sick": (KLBlowUp(), of("train/kl", [2.0] * 10 + [0.7] * 40), [True]),
    "kl at the limit": (KLBlowUp(), of("train/kl", [1.0] * 40), []),
    "no reference, no kl": (KLBlowUp(), of("train/entropy", [4.0] * 20), []),
    "entropy": (EntropyCollapse(), of("train/entropy", [0.5] * 10 + [0.01] * 10), [True]),
    "certain from the start": (EntropyCollapse(), of("train/entropy", [0.02] * 40), []),
    "a tenth of much is enough": (EntropyCollapse(), of("train/entropy", [2.0] * 10 + [0.15] * 20), []),
    "nan loss": (NonFinite(), of("train/loss", [0.1, math.nan, math.nan]), [True]),
    "infinite gradient": (NonFinite(), of("train/gradient_norm", [0.1, math.inf]), [True]),
    "one spike": (GradientSpikes(), of("train/gradient_norm", [*STEADY, 500.0, *STEADY]), []),
    "spikes": (GradientSpikes(), of("train/gradient_norm", [*STEADY, *[500.0, 1.0] * 3, *STEADY]), [True, False]),
    "zeros are no norms": (GradientSpikes(), of("train/gradient_norm", [0.0] * 40 + [3.0] * 19), []),
    "larger gradients are no spikes": (GradientSpikes(), of("train/gradient_norm", [1.02**n for n in range(200)]), []),
    "lengths": (LengthCollapse(), of("rollout/length", [300.0] * 6 + [60.0] * 10), [True]),
    "concise": (LengthCollapse(), of("rollout/length", [300.0 - 3 * n for n in range(50)]), []),
    "cut": (LengthExplosion(), of("rollout/truncated", [0.05] * 6 + [0.6] * 10), [True]),
    "templates": (Templated(), of("rollout/repeated", [0.02] * 6 + [0.9] * 10), [True]),
    "all wrong": (ZeroAdvantages(), [{"rollout/wasted_groups": 1.0, "rollout/pass_rate": 0.0}] * 9, [True]),
    "half of them": (ZeroAdvantages(), [{"rollout/wasted_groups": 0.6, "rollout/pass_rate": 0.5}] * 9, []),
    "other sampler": (SamplerMismatch(), of("train/sampler_mismatch", [0.2] * 3), [True]),
    "bf16 sampler": (SamplerMismatch(), of("train/sampler_mismatch", [0.018] * 30), []),
    "older weights": (
        SamplerMismatch(),
        [{"rollout/steps_behind": 16.0, "parity/mean": 1e-6}, {"train/sampler_mismatch": 0.3}] * 9,
        [],
    ),
    "older weights, and another policy": (
        SamplerMismatch(),
        [{"rollout/steps_behind": 16.0, "parity/mean": 0.1}, {"train/sampler_mismatch": 0.3}] * 9,
        [True],
    ),
    "time-outs": (VerificationFailing(), [{"verdicts/all": 256.0, "verdicts/timeout": 40.0}] * 9, [True]),
    "a time-out": (VerificationFailing(), [{"verdicts/all": 256.0, "verdicts/timeout": 1.0}] * 9, []),
    "bad samples": (SkippedSamples(), [{"samples/drawn": 32.0, "samples/skipped": 4.0}] * 9, [True]),
    "a bad sample": (SkippedSamples(), [{"samples/drawn": 32.0, "samples/skipped": 0.0}] * 9, []),
}


@pytest.mark.parametrize("case", SICK)
def test_figures(case: str) -> None:
    rule, series, expected = SICK[case]
    assert [begins for _, begins in turns(rule, series)] == expected


def rollouts(reward: Sequence[float], rate: Sequence[float], level: Sequence[float]) -> list[Figures]:
    """Rollouts of one level of difficulty each, with an accuracy and another reward."""
    return [
        {"rollout/pass_rate": p, f"pass_rate_by_level/{d:.3f}": p, "reward/accuracy": p, "reward/style": r}
        for r, p, d in zip(reward, rate, level, strict=True)
    ]


def noisy(values: Iterable[float], seed: int = 0) -> list[float]:
    generator = random.Random(seed)
    return [value + generator.gauss(0, 0.03) for value in values]


def ramp(first: float, last: float, count: int = 40) -> list[float]:
    return [first + (last - first) * n / (count - 1) for n in range(count)]


@pytest.mark.parametrize("seed", range(5))
def test_hacking_is_a_reward_that_rises_while_answers_get_worse(seed: int) -> None:
    worse, same = noisy(ramp(0.8, 0.3), seed), noisy([0.5] * 40, seed + 9)
    rising, level = noisy(ramp(0.1, 0.9), seed + 99), [0.5] * 40
    assert [begins for _, begins in turns(RewardHacking(), rollouts(rising, worse, level))] == [True]
    assert turns(RewardHacking(), rollouts(rising, same, level)) == []
    assert turns(RewardHacking(), rollouts(noisy([0.5] * 40, seed), worse, level)) == []
    harder = [round(8 * d) / 8 for d in ramp(0.1, 0.9)]
    assert turns(RewardHacking(), rollouts(rising, noisy([1 - d for d in harder], seed), harder)) == []


def test_hacking_is_seen_on_held_out_questions() -> None:
    """Training questions are still answered, perhaps from memory."""
    series = rollouts(ramp(0.1, 0.9), [0.9] * 40, [0.5] * 40)
    validations = [{"val/pass_rate": rate} for rate in (0.6, 0.7, 0.45, 0.3)]
    mixed = [
        figures for n, validation in enumerate(validations) for figures in (validation, *series[10 * n : 10 * n + 10])
    ]
    assert [begins for _, begins in turns(RewardHacking(), mixed)] == [True]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: KLBlowUp(after=0), "kl_blow_up.after is 0"),
        (lambda: KLBlowUp(above=0.1, well_below=0.5), "above is 0.1 and well_below 0.5"),
        (lambda: KLBlowUp(above=math.nan), "above is nan"),
        (lambda: LengthCollapse(below=0.6), "below is 0.6 and well_above 0.5"),
        (lambda: RewardHacking(fall=2.0), "fall 2.0"),
        (lambda: GradientSpikes(spikes=30), "spikes 30"),
        (lambda: Watch([NonFinite(), NonFinite()]), "non_finite"),
    ],
)
def test_wrong_options_are_named(make: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make()


# ---- one warning for one sickness ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Script(Rule):
    """Reads what it is told."""

    name: ClassVar[str] = "script"
    advice: ClassVar[str] = "none"

    def read(self, figures: Figures, memory: Memory) -> Reading | None:
        return None if not figures else Reading(figures["state"] > 0, figures["state"] < 0, "told")


@given(st.lists(st.sampled_from([1, -1, 0, None]), max_size=60), st.integers(1, 4))
def test_a_sickness_warns_once_and_only_after_enough_readings(states: list[int | None], after: int) -> None:
    watch = Watch([Script(after=after)])
    known: list[int] = []  # readings since the last event
    active = False
    for state in states:
        events = watch.observe(0, {} if state is None else {"state": float(state)})
        known += [] if state is None else [state]
        wanted = -1 if active else 1
        is_due = len(known) >= after and all(value == wanted for value in known[-after:])
        assert bool(events) == (is_due and state is not None)
        if events:
            assert [event.begins for event in events] == [not active]
            active, known = not active, []
    assert watch.marks == {"script": float(active)}
    open_ended = [warning["until"] is None for warning in watch.warnings()]
    assert open_ended == [False] * (len(open_ended) - 1) + [active] * bool(open_ended)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=80), st.integers(1, 6))
def test_trends(values: list[float], window: int) -> None:
    memory: Memory = {}
    trends = [follow(memory, "x", value, window) for value in values]
    assert [trend is None for trend in trends] == [number + 1 < window for number in range(len(values))]
    means = [math.fsum(values[n - window + 1 : n + 1]) / window for n in range(window - 1, len(values))]
    for number, trend in enumerate(trend for trend in trends if trend is not None):
        assert trend.recent == pytest.approx(means[number], abs=1e-9)
        assert trend.best == pytest.approx(max(means[: number + 1]), abs=1e-9)
        assert trend.first == pytest.approx(means[0], abs=1e-9)
        assert trend.fall >= 0
        assert trend.noise >= 0


def test_a_value_that_is_no_number_is_left_out() -> None:
    memory: Memory = {}
    for value in (1.0, math.nan, 1.0, math.inf, 1.0):
        trend = follow(memory, "x", value, 3)
    assert trend is not None
    assert trend.recent == 1.0
