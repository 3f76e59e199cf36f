"""Reads figures with every rule and tells when a sickness begins and when it is over."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from observe_r1.health.rule import Figures, Memory, Rule


@dataclass(frozen=True)
class Event:
    """A sickness begins or is over."""

    name: str
    step: int  # optimizer steps
    begins: bool
    evidence: str
    advice: str
    stops: bool  # a run that is to stop when it is sick

    @property
    def headline(self) -> str:
        """Such as `kl_blow_up at step 12`."""
        return f"{self.name} {'at' if self.begins else 'is over at'} step {self.step}"


@dataclass
class Course:
    """Of one sickness."""

    active: bool = False
    in_row: int = 0  # readings that speak for a change

    def turn(self, sick: bool, well: bool, after: int) -> bool:
        """Takes in a reading; whether the sickness began or ended with it."""
        changes = well if self.active else sick
        self.in_row = self.in_row + 1 if changes else 0
        if self.in_row < after:
            return False
        self.active, self.in_row = not self.active, 0
        return True


class Watch:
    """All rules and what they remember.

    Args:
        rules: Each with a name of its own.

    Raises:
        ValueError: Two rules have the same name.
    """

    def __init__(self, rules: Sequence[Rule]) -> None:
        names = [rule.name for rule in rules]
        shared = {name for name in names if names.count(name) > 1}
        if shared:
            raise ValueError(f"Rules of health share the names {sorted(shared)}: give each a name of its own.")
        self.rules = list(rules)
        self.memories: dict[str, Memory] = {name: {} for name in names}
        self.courses = {name: Course() for name in names}
        self.events: list[Event] = []

    def observe(self, step: int, figures: Figures) -> list[Event]:
        """The events that figures of a moment bring about."""
        events = []
        for rule in self.rules:
            reading = rule.read(figures, self.memories[rule.name])
            course = self.courses[rule.name]
            if reading is not None and course.turn(reading.sick, reading.well, rule.after):
                stops = rule.stops and course.active
                events.append(Event(rule.name, step, course.active, reading.evidence, rule.advice, stops))
        self.events += events
        return events

    def warnings(self) -> list[dict[str, Any]]:
        """The sicknesses that began, with the step at which each was over; `until` is None while it lasts."""
        found: list[dict[str, Any]] = []
        for event in self.events:
            if event.begins:
                told = {"name": event.name, "step": event.step, "until": None, "message": event.evidence}
                found.append({**told, "advice": event.advice, "stops": event.stops})
            else:
                last = next(warning for warning in reversed(found) if warning["name"] == event.name)
                last["until"] = event.step
        return found

    @property
    def marks(self) -> dict[str, float]:
        """1 for every sickness that goes on, 0 for the others."""
        return {name: float(course.active) for name, course in self.courses.items()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "memories": copy.deepcopy(self.memories),
            "courses": {name: asdict(course) for name, course in self.courses.items()},
            "events": [asdict(event) for event in self.events],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Rules that the state does not know start anew, and what it knows of others is dropped."""
        for name in self.courses.keys() & state["courses"].keys():
            self.courses[name] = Course(**state["courses"][name])
            self.memories[name] = copy.deepcopy(state["memories"][name])
        self.events = [Event(**event) for event in state["events"]]
