"""Saved predictions, what is reported of them, and the metric over ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from observe_r1.commands import score
from observe_r1.evaluation import MMMU, Item, Judgement, MathVista, Outcome, Tally, Verdict
from observe_r1.evaluation.asking import blocks_of, share, spread
from observe_r1.evaluation.metric import BenchmarkScores
from observe_r1.evaluation.predictions import (
    Header,
    Prediction,
    PredictionLog,
    answered_before,
    partial_path,
    read_predictions,
    write_predictions,
)
from observe_r1.evaluation.report import Marks, report
from observe_r1.evaluation.score import score_predictions

HEADER = Header("observe_r1.evaluation.mmmu.MMMU", "mmmu", 40, {"weights": "abc"})
ITEMS = [
    Item(
        f"validation_{'Math' if number % 2 else 'Art'}_{number}",
        "B",
        "multiple-choice",
        choices=["red", "blue", "green"],
        groups={"subject": ["Math" if number % 2 else "Art"]},
    )
    for number in range(40)
]
RESPONSES = ("B", "<answer>b</answer>", "C", "no idea", "\ud800 \x00", "<answer>(B) blue</answer>")


def prediction(position: int, response: str | None = None) -> Prediction:
    text = RESPONSES[position % len(RESPONSES)] if response is None else response
    verdict = MMMU().judge(ITEMS[position], text)
    return Prediction(ITEMS[position], position, "hash", text, len(text), position % 3 == 0, position % 2 == 0, verdict)


class OfItems(MMMU):
    items = ITEMS


def test_predictions_survive_a_file(tmp_path: Path) -> None:
    saved = [prediction(position) for position in range(40)]
    write_predictions(tmp_path / "a.jsonl", HEADER, saved)
    assert read_predictions(tmp_path / "a.jsonl") == (HEADER, saved)


def test_an_interrupted_file_goes_on(tmp_path: Path) -> None:
    """Of the same settings, without its torn last line; other settings, other questions and noise are left alone."""
    path = tmp_path / "step.jsonl"
    log = PredictionLog(partial_path(path, 1), HEADER, [prediction(3)])
    log.append([prediction(5), prediction(7)])
    with partial_path(path, 1).open("a") as file:
        file.write(json.dumps(prediction(9).to_json())[:50])
    PredictionLog(partial_path(path, 0), Header("x", "mmmu", 40, {"weights": "other"}), [prediction(11)])
    partial_path(path, 2).write_text("")
    assert answered_before(path, HEADER, ITEMS) == {position: prediction(position) for position in (3, 5, 7)}
    changed = [*ITEMS[:5], Item("other", "B"), *ITEMS[6:]]
    assert set(answered_before(path, HEADER, changed)) == {3, 7}
    write_predictions(path, HEADER, [prediction(0)])
    assert set(answered_before(path, HEADER, ITEMS)) == {0, 3, 5, 7}


@pytest.mark.parametrize("content", ["", "{}", "[]", "{\n{}\n", '{"format": "observe_r1.predictions.1"}'])
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "other.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"other\.jsonl"):
        read_predictions(tmp_path / "other.jsonl")


def test_scoring_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Verdicts come from the responses; the figures equal those of the metric on the questions themselves."""
    saved = [prediction(position) for position in range(40)]
    wrong = Judgement(Outcome.WRONG, "?")
    forged = [Prediction(**{**vars_of(saved[0]), "verdict": Verdict("?", wrong, wrong)}), *saved[1:]]
    write_predictions(tmp_path / "p.jsonl", HEADER, reversed(forged))
    result = score_predictions(tmp_path / "p.jsonl", output=tmp_path / "again.jsonl", report_to=tmp_path / "r.json")
    expected = report(OfItems(), ITEMS, Marks.of(saved, 40))
    assert result == expected
    assert read_predictions(tmp_path / "again.jsonl") == (HEADER, saved)
    assert json.loads((tmp_path / "r.json").read_text()) == expected.to_json()
    assert "1 verdicts differ" in capsys.readouterr().out


def vars_of(one: Prediction) -> dict[str, object]:
    return {name: getattr(one, name) for name in Prediction.__dataclass_fields__}


@pytest.mark.parametrize(
    "name", ["os.path", "mine.Thing", "observe_r1.evaluation.mmmu.DOMAIN_OF", "observe_r1.evaluation.x.Y"]
)
def test_a_file_does_not_choose_what_is_imported(tmp_path: Path, name: str) -> None:
    write_predictions(tmp_path / "p.jsonl", Header(name, "x", 1, {}), [prediction(0)])
    with pytest.raises(ValueError, match=name):
        score_predictions(tmp_path / "p.jsonl")


def test_a_benchmark_with_arguments_of_its_own_scores_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "either.py").write_text(
        "from observe_r1.evaluation import MMMU, Judgement, Verdict\n\n"
        "class Either(MMMU):\n"
        "    def __init__(self, accepted: list[str]):\n"
        "        self.accepted = accepted\n\n"
        "    def judge(self, item, response):\n"
        "        judgement = Judgement.of(response in self.accepted, response)\n"
        "        return Verdict(response, judgement, judgement)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    header = Header("either.Either", "mmmu", 3, {})
    write_predictions(tmp_path / "p.jsonl", header, [prediction(n, text) for n, text in enumerate("BCD")])
    with pytest.raises(ValueError, match=r"--benchmark either\.Either, .*--benchmark\.ARGUMENT VALUE"):
        score([str(tmp_path / "p.jsonl")])
    with pytest.raises(SystemExit) as end:
        score([str(tmp_path / "p.jsonl"), "--benchmark=either.Either", "--benchmark.accepted=[C, D]"])
    assert end.value.code == 0
    assert "2 / 3" in capsys.readouterr().out


@given(
    st.lists(st.integers(0, 39), unique=True, min_size=1),
    st.integers(1, 5),
    st.integers(1, 7),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_split_over_ranks_gives_the_same_figures(
    positions: list[int], ranks: int, size: int, dtype: torch.dtype
) -> None:
    """Blocks are dealt as in an evaluation, short shares filled up; states merged as DDP merges them."""
    blocks = blocks_of(sorted(positions), size)
    metrics = []
    for rank in range(ranks):
        metric = BenchmarkScores(OfItems()).to(dtype)
        for block in share(blocks, rank, ranks):
            metric.update([prediction(position) for position in block])
        metrics.append(metric)
    merged = BenchmarkScores(OfItems())
    for column in Marks.__dataclass_fields__:
        reduce = merged._reductions[column]
        assert callable(reduce)
        setattr(merged, column, reduce(torch.stack([getattr(metric, column) for metric in metrics])))
    merged.update([])
    merged._update_count = 1
    expected = report(OfItems(), ITEMS, Marks.of([prediction(position) for position in positions], 40))
    assert merged.compute() == expected.figures()
    counted = expected.overall["strict"]
    right = [position for position in positions if prediction(position).verdict.strict.is_right]
    assert counted == Tally(len(right), len(positions))
    tokens = sum(len(prediction(position).response) for position in positions)
    assert expected.length == tokens / len(positions)


@given(st.integers(0, 300), st.integers(1, 40), st.integers(1, 9))
def test_every_block_is_asked_and_shares_are_equal(count: int, size: int, ranks: int) -> None:
    blocks = blocks_of(range(count), size)
    shares = [share(blocks, rank, ranks) for rank in range(ranks)]
    assert len({len(one) for one in shares}) == 1
    assert sorted({position for one in shares for block in one for position in block}) == list(range(count))


@pytest.mark.parametrize(
    ("count", "wanted", "expected"), [(10, 3, [0, 3, 6]), (3, 10, [0, 1, 2]), (3, None, [0, 1, 2])]
)
def test_a_selection_is_spread_evenly(count: int, wanted: int | None, expected: list[int]) -> None:
    assert spread(count, wanted) == expected


def test_figures_are_whole_in_a_narrow_terminal() -> None:
    """The names are broken instead; what looks like markup in them stays."""
    marks = Marks.of([prediction(position) for position in range(40)], 40)
    items = [replace(item, groups={**item.groups, "kind": ["[red] from a data set"]}) for item in ITEMS]
    console = Console(width=80, record=True, file=StringIO())
    console.print(report(OfItems(), items, marks).table())
    shown = console.export_text()
    for whole in ("strict", "lenient", "official", "right / all", " / 40", "overall", "[red] from a"):
        assert whole in shown


def test_nothing_answered_is_nothing_to_report() -> None:
    with pytest.raises(ValueError, match="mathvista: no question was answered"):
        report(MathVista(), ITEMS, Marks.of([], 40))
