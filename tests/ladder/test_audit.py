"""The audit: no finding on sound golds, every planted fault found, and an exit code to act on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from observe_r1.answers import Gold, fast_verdict
from observe_r1.ladder.answer_cases import FORMAT_CASES, answer_cases
from observe_r1.ladder.audit import AuditLimits, audit_ladder
from observe_r1.ladder.shards import write_ladder
from observe_r1.rewards import AccuracyReward
from observe_r1.rewards.verification import Verdict
from observe_r1.tags import is_well_formed

GOLDS = [
    Gold("3"), Gold("-1/3"), Gold("0.5"), Gold("2500"), Gold("50%"), Gold("12 cm^2"), Gold("12", unit="cm"),
    Gold("3.14", precision=2), Gold("B"), Gold("(C)"), Gold(r"\boxed{A}"), Gold("2 cm", choices=("1 cm", "2 cm")),
    Gold("b", "choice"), Gold("red"), Gold("Yes"), Gold("10:30"), Gold(r"\sqrt{2}+x"), Gold(r"$\frac{\pi}{3}$"),
    Gold("(1,2)"), Gold("x=3"), Gold(r"\{1,2\}"), Gold(r"[1,\infty)"), Gold(r"\pm 2"), Gold(r"60^\circ"), Gold("0"),
]  # fmt: skip


class AcceptsAnything(AccuracyReward):
    def verdicts(self, pairs: Any) -> list[Verdict]:
        return [Verdict.CORRECT] * len(pairs)


class ExactText(AccuracyReward):
    """Compares letter by letter, as the authors' release does in its second step."""

    def verdicts(self, pairs: Any) -> list[Verdict]:
        return [Verdict.CORRECT if f"<answer>{gold.answer}</answer>" in text else Verdict.WRONG for gold, text in pairs]


def printed(capsys: Any) -> str:
    """What was printed, without the breaks of lines."""
    return " ".join(capsys.readouterr().out.split())


@pytest.fixture
def ladder(tmp_path: Path, make_sample: Any) -> Path:
    samples = [
        make_sample(
            number, answer=g.answer, answer_type=g.answer_type, choices=g.choices, precision=g.precision, unit=g.unit,
            source="a" if number % 2 else "b",
        )
        for number, g in enumerate(GOLDS)
    ]  # fmt: skip
    write_ladder(samples, tmp_path / "ladder")
    return tmp_path / "ladder"


def test_names_are_no_markup(tmp_path: Path, make_sample: Any, capsys: Any) -> None:
    write_ladder([make_sample(n, source=source) for n, source in enumerate(("[/b]", "[red]"))], tmp_path / "ladder")
    assert audit_ladder(tmp_path / "ladder").exit_code == 0
    shown = printed(capsys)
    assert "[/b]" in shown
    assert "[red]" in shown


def test_sound_golds_pass(ladder: Path, tmp_path: Path, capsys: Any) -> None:
    found = audit_ladder(ladder, report=tmp_path / "report.json")
    assert found.exit_code == 0
    total = found.total
    assert total.golds == len(GOLDS)
    assert (total.unparseable, total.false_negatives, total.false_positives, total.format_errors) == (0, 0, 0, 0)
    assert total.right_answers > 5 * len(GOLDS)
    assert total.wrong_answers > 5 * len(GOLDS)
    assert set(found.sources) == {"a", "b"}
    assert json.loads((tmp_path / "report.json").read_text())["total"]["golds"] == len(GOLDS)
    assert "Nothing speaks against training" in capsys.readouterr().out


def test_a_reward_that_accepts_anything_is_found(ladder: Path, capsys: Any) -> None:
    found = audit_ladder(ladder, accuracy=AcceptsAnything())
    assert found.exit_code == 1
    assert found.total.false_positives == found.total.wrong_answers
    assert "wrong answers are judged right (100.00%, limits.false_positives is 0.10%)" in printed(capsys)


def test_a_reward_that_compares_letter_by_letter_is_found(ladder: Path) -> None:
    found = audit_ladder(ladder, accuracy=ExactText())
    assert found.exit_code == 1
    assert found.total.false_negatives > 0.8 * found.total.right_answers
    assert found.forms["false negative: boxed"] > 20
    assert audit_ladder(ladder, accuracy=ExactText(), limits=AuditLimits(false_negatives=1.0)).exit_code == 0


def test_damaged_samples_and_golds_beyond_the_limits(tmp_path: Path, make_sample: Any, capsys: Any) -> None:
    samples = [make_sample(0, answer="9^{9^{9^9}}", answer_type="math"), make_sample(1), make_sample(2)]
    write_ladder(samples, tmp_path / "ladder")
    shard = tmp_path / "ladder/shard-000000.tar"
    shard.write_bytes(shard.read_bytes().replace(b'"answer": "2"', b'"answer": 2  '))
    found = audit_ladder(tmp_path / "ladder")
    assert (found.total.unparseable, dict(found.unreadable)) == (1, {"shard_changed": 1})
    assert len(found.reasons) == 2
    assert "1 samples cannot be read: shard_changed" in capsys.readouterr().out
    shard.with_name(f"{shard.name}.idx").unlink()  # indexed as it is, the sample has another fault
    assert audit_ladder(tmp_path / "ladder").unreadable == {"field_invalid": 1}


def test_on_the_command_line(ladder: Path, tmp_path: Path, command_line: Any) -> None:
    run = command_line(tmp_path)
    assert "Nothing speaks against" in run("audit", ladder, "--limit=10")
    (tmp_path / "mine.py").write_text(
        "from observe_r1.rewards import AccuracyReward\nfrom observe_r1.rewards.verification import Verdict\n"
        "class Generous(AccuracyReward):\n"
        "    def verdicts(self, pairs):\n        return [Verdict.CORRECT] * len(pairs)\n"
    )
    assert "Do not train on it" in run("audit", ladder, "--accuracy=mine.Generous", expect=1)
    assert "holds no shards" in run("audit", tmp_path / "nothing", expect=1)


@settings(max_examples=200)
@given(
    st.one_of(
        st.integers(-(10**7), 10**7).map(str),
        st.fractions(max_denominator=50).map(str),
        st.decimals(-1000, 1000, places=3).map(str),
        st.sampled_from(["red", "dark red", "Yes", "north-west", "Figure 2"]),
        st.sampled_from("ABCDE"),
    )
)
def test_what_needs_no_algebra_is_judged_as_expected(answer: str) -> None:
    """Every form of a gold is right and every wrong answer wrong, without math-verify: an undecided one is neither."""
    gold = Gold(answer)
    for case in answer_cases(gold):
        assert fast_verdict(gold, case.answer) in (case.expected, None), case


def test_format_cases() -> None:
    assert {form: is_well_formed(text.format("3")) for form, (text, _) in FORMAT_CASES.items()} == {
        form: expected for form, (_, expected) in FORMAT_CASES.items()
    }
    assert {expected for _, expected in FORMAT_CASES.values()} == {True, False}
