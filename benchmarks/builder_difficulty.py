"""Does the difficulty that `ladder build` measures agree with how hard the questions were made?

python benchmarks/builder_difficulty.py [--questions 384] [--annotations 64]

Questions of the quick start are written as a user would bring them (a folder of pictures and JSON Lines), imported and
built by the command line, with the shipped policy. What it answers was learnt from a careless annotator, who overlooks
and confuses small shapes; how often he is wrong about a question is the generator's own level, and it is computed
without any model. Prints Spearman's rank correlation with it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from observe_r1.ladder.reader import LadderDataset
from observe_r1.quickstart.annotations import annotate
from observe_r1.quickstart.pass_rates import is_correct
from observe_r1.quickstart.questions import Question, make_question


def level(question: Question, annotations: int) -> float:
    """How often the careless annotator is wrong."""
    gold, rng = question.prompt().gold, random.Random(question.id)
    return 1 - sum(is_correct(annotate(question, rng), gold) for _ in range(annotations)) / annotations


def small_shapes(question: Question) -> int:
    """Shapes that matter for the answer and are easily misread."""
    if question.target is not None:
        return int(question.shapes[question.target].size == "small")
    return sum(shape.size == "small" and shape.color in question.about for shape in question.shapes)


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Rank correlation; ties share their mean rank."""
    return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def write_folder(questions: Sequence[Question], folder: Path) -> None:
    """Pictures and JSON Lines, as a user would bring them."""
    (folder / "images").mkdir(parents=True)
    with (folder / "questions.jsonl").open("w") as file:
        for number, question in enumerate(questions):
            prompt = question.prompt()
            prompt.images[0].save(folder / f"images/{number}.png")
            content = [{"type": "image", "image": f"images/{number}.png"}, {"type": "text", "text": question.text}]
            messages = [prompt.messages[0], {"role": "user", "content": content}]
            row = {"id": prompt.id, "source": prompt.source, "messages": messages, "answer": prompt.gold.answer}
            file.write(json.dumps(row) + "\n")


def measured(ladder: Path, ids: Sequence[str]) -> list[float]:
    """The difficulties of a ladder, by id."""
    difficulties = {prompt.id: prompt.difficulty for prompt in LadderDataset(ladder)}
    return [difficulties[id] for id in ids]


def run(directory: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "observe_r1", "ladder", *arguments]
    subprocess.run(command, cwd=directory, env={**os.environ, "COLUMNS": "100"}, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=384)
    parser.add_argument("--annotations", type=int, default=64)
    arguments = parser.parse_args()
    questions = {q.id: q for q in (make_question("train", 1, number) for number in range(arguments.questions))}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_folder(list(questions.values()), directory / "shapes")
        run(directory, "import", "shapes", "imported")
        started = time.perf_counter()
        options = ("--label_noise.drop=none", "--mixing=none", "--trainer.enable_progress_bar=false")
        config = ("--config=ladder/build_quickstart.yaml", "--sources=[imported]")
        run(directory, "build", *config, *options, "--output=built")
        seconds = time.perf_counter() - started
        run(directory, "build", *config, *options, "--output=other_samples", "--seed=1")
        difficulties, other = (measured(directory / name, list(questions)) for name in ("built", "other_samples"))
    levels = [level(question, arguments.annotations) for question in questions.values()]
    small = [small_shapes(question) for question in questions.values()]
    # two measurements of the same levels by chance alone, as often as the builder asks: what could be reached at best
    rng = np.random.default_rng(0)
    again = [1 - rng.binomial(8, 1 - value) / 8 for value in levels]
    result = {
        "questions": len(questions),
        "rollouts": 8,
        "spearman_with_annotator": round(spearman(difficulties, levels), 3),
        "spearman_between_two_builds": round(spearman(difficulties, other), 3),
        "spearman_of_eight_annotations": round(spearman(again, levels), 3),
        "spearman_with_small_shapes": round(spearman(difficulties, small), 3),
        "build_seconds": round(seconds, 1),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
