"""Rewards of one's own that do not load, raise, or return something else than scores."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from mistake import Mistake, file

OWN = ("--model.rewards.odd=mine.Mine",)
REWARD = (
    "from observe_r1.rewards import Reward\nclass Mine(Reward):\n    def score(self, prompt, completion):\n        "
)

MISTAKES = [
    Mistake("syntax", OWN, ("invalid syntax", "mine.py, line 1"), file("mine.py", "class Mine(:\n"), code=2),
    Mistake("no reward", OWN, ("mine.Mine", "subclass of Reward"), file("mine.py", "class Mine: pass\n"), code=2),
    Mistake("import", OWN, ("No module named 'nosuch'", "install"), file("mine.py", "import nosuch\n"), code=2),
    Mistake(
        "method missing",
        OWN,
        ("abstract", "mine.Mine lacks score"),
        file("mine.py", "from observe_r1.rewards import Reward\nclass Mine(Reward):\n    def scores(self): ...\n"),
        code=2,
    ),
    Mistake(
        "raises",
        OWN,
        ('mine.py", line 4, in score', "{{}}['a']", "KeyError: 'a'", "reward 'odd'"),
        file("mine.py", REWARD + "{}['a']\n"),
    ),
    Mistake(
        "setup",
        OWN,
        ('mine.py", line 6, in setup', "has no attribute 'missing'"),
        file("mine.py", REWARD + "...\n    def setup(self):\n        self.missing\n"),
    ),
    Mistake("none", OWN, ("reward 'odd'", "with None", "finite number"), file("mine.py", REWARD + "pass\n")),
    Mistake(
        "nan", OWN, ("reward 'odd'", "with nan", "finite number"), file("mine.py", REWARD + "return float('nan')\n")
    ),
    Mistake(
        "length",
        OWN,
        ("reward 'odd' returned [1, 1", "for [4, 4"),
        file("mine.py", REWARD + "...\n    def score_groups(self, groups): return [[1.0] for _ in groups]\n"),
    ),
    Mistake(
        "flat",
        OWN,
        ("reward 'odd' returned [1.0, 1.0", "a list for every group"),
        file("mine.py", REWARD + "...\n    def score_groups(self, groups): return [1.0 for _ in groups]\n"),
    ),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_is_named(mistake: Mistake, told: Callable[[Mistake], None]) -> None:
    told(mistake)
