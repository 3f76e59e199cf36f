"""The rules on figures of real runs: the quick start as it is, and made sick by benchmarks/sick_runs.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sick_runs import VARIANTS

from observe_r1.callbacks.health import Health
from observe_r1.health.watch import Event, Watch

SERIES = Path(__file__).parent / "series"


def recorded(name: str) -> list[tuple[int, dict[str, float]]]:
    """(optimizer steps, figures) in the order in which the run had them."""
    steps, found = 0, []
    for line in (SERIES / f"{name}.jsonl").read_text().splitlines():
        figures: dict[str, float] = json.loads(line)
        steps += "train/loss" in figures
        found.append((steps, figures))
    return found


def watched(name: str) -> list[Event]:
    watch = Health().watch
    for steps, figures in recorded(name):
        watch.observe(steps, figures)
    return watch.events


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.warning is None])
def test_healthy_runs_give_no_warning(name: str) -> None:
    series = recorded(name)
    assert (series[-1][0], sum("rollout/reward" in figures for _, figures in series)) == (96, 48)
    assert watched(name) == []


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.warning is not None])
def test_a_sick_run_is_named_once(name: str) -> None:
    events = watched(name)
    assert VARIANTS[name].warning in [event.name for event in events if event.begins]
    for rule in {event.name for event in events}:
        turns = [event.begins for event in events if event.name == rule]
        assert turns == [number % 2 == 0 for number in range(len(turns))]  # begins, is over, begins …
        assert len(turns) <= 3
    for event in events:
        assert event.evidence
        assert len(event.advice) > 40


@pytest.mark.parametrize("name", ["reward_hacking", "kl_blow_up"])
def test_a_watch_that_is_saved_and_loaded_tells_the_same(name: str) -> None:
    """Through JSON, so that nothing in the state is more than plain data."""
    series = recorded(name)
    whole = watched(name)
    for cut in range(0, len(series), 9):
        first, second = Health().watch, Health().watch
        before = [event for steps, figures in series[:cut] for event in first.observe(steps, figures)]
        state: dict[str, Any] = json.loads(json.dumps(first.state_dict()))
        second.load_state_dict(state)
        after = [event for steps, figures in series[cut:] for event in second.observe(steps, figures)]
        assert [*before, *after] == second.events == whole


def test_rules_that_a_checkpoint_does_not_know_start_anew() -> None:
    saved = Watch(Health(kl_blow_up=None).watch.rules)
    for steps, figures in recorded("kl_blow_up"):
        saved.observe(steps, figures)
    loaded = Health(length_collapse=None).watch
    loaded.load_state_dict(saved.state_dict())
    assert not loaded.courses["kl_blow_up"].active
    assert "length_collapse" not in loaded.courses
    assert loaded.courses["entropy_collapse"].active
