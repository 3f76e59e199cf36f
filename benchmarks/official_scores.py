"""Compares the strict scoring with the official code, item by item.

    git clone https://github.com/lupantech/MathVista && git clone https://github.com/MMMU-Benchmark/MMMU
    python benchmarks/official_scores.py --mathvista MathVista --mmmu MMMU [--fuzz 20000] [--seed 0]

Runs the functions of both repositories beside ours on every prediction file they ship and on random inputs. Prints
agreements and disagreements, and exits with 1 on any disagreement. Needs the extras `eval` and `bench`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from official_inputs import random_mathvista, random_mmmu, random_mmmu_row

from observe_r1.evaluation import mathvista, mmmu, mmmu_scoring
from observe_r1.evaluation.item import Item, Outcome
from observe_r1.evaluation.mathvista_scoring import official_prediction
from observe_r1.evaluation.tally import break_down, tally

MATHVISTA_TOTALS = {
    "output_bard.json": 348,
    "output_gpt4.json": 261,
    "output_gpt4_2shot_solution_use_ocr.json": 321,
    "output_idefics_9b_instruct.json": 200,
    "output_random_guess.json": 179,
}
MMMU_TOTALS = {"llava1.5_13b": 330, "qwen_vl": 325}


class Comparison:
    """Counts agreements by name and keeps the first disagreements."""

    def __init__(self) -> None:
        self.agreed: dict[str, int] = {}
        self.disagreed: dict[str, int] = {}
        self.examples: list[str] = []

    def check(self, name: str, ours: Any, official: Any, about: object = "") -> None:
        same = repr(ours) == repr(official)  # nan is nan, 1 is not 1.0
        counts = self.agreed if same else self.disagreed
        counts[name] = counts.get(name, 0) + 1
        if not same and len(self.examples) < 20:
            self.examples.append(f"{name}: ours {ours!r}, official {official!r}, on {str(about)[:600]}")

    def report(self) -> int:
        print(f"\n{'comparison':<62}{'agree':>9}{'disagree':>10}")
        for name in dict.fromkeys([*self.agreed, *self.disagreed]):
            print(f"{name:<62}{self.agreed.get(name, 0):>9,}{self.disagreed.get(name, 0):>10,}")
        print(*self.examples, sep="\n")
        return 1 if self.disagreed else 0


def load_official(path: Path) -> ModuleType:
    """A module of an official checkout. What it imports and never calls here is replaced where it is missing."""
    for name, attributes in (
        ("datasets", ["load_dataset"]),
        ("utilities", ["read_json", "save_json"]),
        ("tqdm", ["tqdm"]),
    ):
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            sys.modules[name] = ModuleType(name)
            for attribute in attributes:
                setattr(sys.modules[name], attribute, None)
    specification = importlib.util.spec_from_file_location(f"official_{path.stem}", path)
    assert specification is not None
    assert specification.loader is not None, path
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def result(function: Callable[[], Any]) -> Any:
    """What a function returns, or that it raises; the kinds of exceptions need not be the same."""
    try:
        return function()
    except Exception:
        return "raises"


@contextmanager
def without_guesses(official: ModuleType) -> Iterator[None]:
    """In the official parser, a random choice becomes none at all."""

    class NoChoice:
        @staticmethod
        def choice(_: object) -> None:
            return None

    kept, official.random = official.random, NoChoice
    try:
        yield
    finally:
        official.random = kept


# ---- MathVista ------------------------------------------------------------------------------------------------------


def official_mathvista(official: ModuleType, extraction: object, item: Item) -> Any:
    return official.normalize_extracted_answer(
        extraction, item.choices, item.question_type, item.answer_type, item.precision
    )


def compare_mathvista(root: Path, fuzz: int, seed: int, comparison: Comparison) -> None:
    official = load_official(root / "evaluation" / "calculate_score.py")
    for path in sorted((root / "results").glob("*/output*.json")):
        compare_mathvista_file(official, path, comparison)
    generator = random.Random(seed)
    right = 0
    for _ in range(fuzz):
        extraction, item = random_mathvista(generator)
        expected = result(lambda: official_mathvista(official, extraction, item))  # noqa: B023 - called at once
        ours = result(lambda: official_prediction(extraction, item))  # noqa: B023
        comparison.check("MathVista, random inputs: prediction", ours, expected, (extraction, item))
        right += ours == item.answer
    print(f"MathVista, random inputs: {right:,} of {fuzz:,} are right answers")


def compare_mathvista_file(official: ModuleType, path: Path, comparison: Comparison) -> None:
    import pandas

    problems = list(json.loads(path.read_text(encoding="utf-8")).values())
    items, outcomes, rows = [], [], []
    for problem in problems:
        item = mathvista.item_of(problem)
        extraction = problem.get("extraction", "")  # two problems of one file have none
        expected = official_mathvista(official, extraction, item)
        ours = official_prediction(extraction, item)
        correct = official.safe_equal(expected, problem["answer"])
        comparison.check("MathVista, shipped files: prediction", ours, expected, (path.name, problem))
        comparison.check("MathVista, shipped files: verdict", ours == item.answer, correct, (path.name, problem))
        items.append(item)
        outcomes.append(Outcome.RIGHT if ours == item.answer else Outcome.WRONG)
        rows.append({**problem, **problem["metadata"], "true_false": correct})
    table = pandas.DataFrame(rows)
    for group, by_value in break_down(items, outcomes).items():
        for value, counted in by_value.items():
            expected = official.get_acc_with_contion(table, group, value)
            ours = (counted.correct, counted.total, counted.accuracy)
            comparison.check("MathVista, shipped files: breakdown", ours, expected, (path.name, group, value))
    total = tally(outcomes)
    assert total is not None
    stored = sum(bool(problem.get("true_false")) for problem in problems)
    print(f"MathVista {path.name:<60}{total.correct:>5}/{total.total} (stored in the file: {stored})")
    if path.name in MATHVISTA_TOTALS:
        comparison.check("MathVista, official totals", total.correct, MATHVISTA_TOTALS[path.name], path.name)


# ---- MMMU -----------------------------------------------------------------------------------------------------------


def compare_mmmu(root: Path, fuzz: int, seed: int, comparison: Comparison) -> None:
    official = load_official(root / "mmmu" / "utils" / "eval_utils.py")
    prompts = load_official(root / "mmmu" / "utils" / "data_utils.py")
    outputs = root / "mmmu" / "example_outputs"
    for model, total in MMMU_TOTALS.items():
        compare_mmmu_model(official, list(prompts.CAT_SHORT2LONG.values()), outputs / model, total, comparison)
    answers = json.loads((root / "mmmu" / "answer_dict_val.json").read_text())
    for path in sorted(outputs.rglob("*_val*.json")):
        compare_parsed_file(official, path, answers, comparison)
    for path in sorted((root / "mmmu-pro" / "output").glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            compare_response(official, "MMMU, responses to MMMU-Pro", *pro_item(json.loads(line)), comparison)
    generator = random.Random(seed)
    for _ in range(fuzz):
        compare_response(official, "MMMU, random inputs", *random_mmmu(generator), comparison)
    settings = prompts.load_yaml(root / "mmmu" / "configs" / "llava1.5.yaml")
    settings = {name: value[0] for name, value in settings.items()}
    for _ in range(1000):
        row = random_mmmu_row(generator)
        expected = prompts.construct_prompt(row, settings)["final_input_prompt"]
        ours = mmmu.prompt_text(mmmu.item_of(row), row["question"])
        comparison.check("MMMU, random rows: prompt", ours, expected, row)


def compare_response(official: ModuleType, name: str, response: str, item: Item, comparison: Comparison) -> Outcome:
    """Parsing without guesses and the verdict; gives our outcome."""
    strict = mmmu_scoring.judge_strictly(response, item)
    if item.question_type == mmmu_scoring.MULTIPLE_CHOICE:
        letters = mmmu_scoring.letters_of(item.choices)
        with without_guesses(official):
            options = dict(zip(letters, item.choices, strict=True))
            expected = official.parse_multi_choice_response(response, letters, options)
        correct = official.eval_multi_choice(item.answer, expected)
        comparison.check(f"{name}: letter", strict.prediction, expected, (response, item))
    else:
        parsed = official.parse_open_response(response)
        correct = official.eval_open(item.answer, parsed)
        ours = sorted(map(repr, mmmu_scoring.open_candidates(response)))
        comparison.check(f"{name}: candidates", ours, sorted(map(repr, parsed)), (response, item))
    comparison.check(f"{name}: verdict", strict.is_right, correct, (response, item))
    return strict.outcome


def compare_mmmu_model(
    official: ModuleType, subjects: list[str], directory: Path, total: int, comparison: Comparison
) -> None:
    """One model's responses, first without and then with the official guesses."""
    official.random.seed(mmmu_scoring.GUESSING_SEED)
    items, strict, by_subject = [], [], {}
    for subject in subjects:
        samples = json.loads((directory / subject / "output.json").read_text(encoding="utf-8"))
        for sample in samples:
            item = shipped_item(sample)
            items.append(item)
            strict.append(compare_response(official, "MMMU, shipped responses", sample["response"], item, comparison))
            if item.question_type == mmmu_scoring.MULTIPLE_CHOICE:
                sample["parsed_pred"] = official.parse_multi_choice_response(
                    sample["response"], sample["all_choices"], sample["index2ans"]
                )
            else:
                sample["parsed_pred"] = official.parse_open_response(sample["response"])
        judged, figures = official.evaluate(samples)
        by_subject[subject] = {**figures, "num_example": len(samples), "judged": judged}
    guessed = mmmu_scoring.guesses(items, strict)
    judged = {name: verdict for figures in by_subject.values() for name, verdict in figures["judged"].items()}
    for item, outcome in zip(items, guessed, strict=True):
        ours = "Correct" if outcome is Outcome.RIGHT else "Wrong"
        comparison.check("MMMU, shipped responses: verdict with guesses", ours, judged[item.id], item)
    counted = break_down(items, guessed)
    for subject, figures in by_subject.items():
        ours_of = counted["subject"][subject]
        comparison.check("MMMU, shipped responses: subject", ours_of.accuracy, figures["acc"], subject)
    for domain, names in mmmu.SUBJECTS.items():
        expected = official.calculate_ins_level_acc({name: by_subject[name] for name in names.split()})
        ours = round(counted["domain"][domain].accuracy, 6)
        comparison.check("MMMU, shipped responses: domain", ours, round(expected, 6), domain)
    with_guesses, without = tally(guessed), tally(strict)
    assert with_guesses is not None
    assert without is not None
    undecided = strict.count(Outcome.NO_CANDIDATE)
    print(
        f"MMMU {directory.name}: {with_guesses.correct}/{with_guesses.total} with the official guesses, "
        f"{without.correct}/{without.total} without; {undecided} responses name no option"
    )
    comparison.check("MMMU, official totals", with_guesses.correct, total, directory.name)


def shipped_item(sample: dict[str, Any]) -> Item:
    subject = "_".join(sample["id"].split("_")[1:-1])
    groups = {"subject": [subject], "domain": [mmmu.DOMAIN_OF[subject]]}
    choices = list(sample.get("index2ans", {}).values())
    return Item(sample["id"], sample["answer"], sample["question_type"], choices=choices, groups=groups)


def compare_parsed_file(official: ModuleType, path: Path, answers: dict[str, Any], comparison: Comparison) -> None:
    """A file of letters and open responses, as the official script without parsing takes them."""
    correct = 0
    for name, prediction in json.loads(path.read_text(encoding="utf-8")).items():
        gold, kind = answers[name]["ground_truth"], answers[name]["question_type"]
        item = Item(name, gold, kind, choices=["A"] * 9)
        if kind == mmmu_scoring.MULTIPLE_CHOICE:
            expected = official.eval_multi_choice(gold, prediction)
            ours = mmmu_scoring.judge_strictly(prediction, item).is_right
        else:
            expected = official.eval_open(gold, official.parse_open_response(prediction))
            ours = mmmu_scoring.judge_strictly(prediction, item).is_right
        comparison.check("MMMU, shipped predictions: verdict", ours, expected, (path.name, name, prediction))
        correct += ours
    print(f"MMMU {path.relative_to(path.parents[1])}: {correct} right")


def pro_item(sample: dict[str, Any]) -> tuple[str, Item]:
    import ast

    choices = list(map(str, ast.literal_eval(sample["options"])))
    response = sample["response"] if isinstance(sample["response"], str) else ""
    return response, Item(sample["id"], sample["answer"], mmmu_scoring.MULTIPLE_CHOICE, choices=choices)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mathvista", type=Path, required=True, help="checkout of lupantech/MathVista")
    parser.add_argument("--mmmu", type=Path, required=True, help="checkout of MMMU-Benchmark/MMMU")
    parser.add_argument("--fuzz", type=int, default=20_000, help="random inputs for each benchmark")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs")
    options = parser.parse_args()
    for directory in (options.mathvista, options.mmmu):
        if not directory.is_dir():
            parser.error(f"no directory {directory}")
    comparison = Comparison()
    compare_mathvista(options.mathvista, options.fuzz, options.seed, comparison)
    compare_mmmu(options.mmmu, options.fuzz, options.seed, comparison)
    sys.exit(comparison.report())


if __name__ == "__main__":
    main()
