"""The first pass over questions that are to become a ladder: which of them can be judged, seen, and told apart.

A gold has to be equal to itself and to refuse wrong answers, by the verification that training uses. A question that
occurs again, or that is part of a benchmark, is found by its pixels and its words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from observe_r1.answers import normalise
from observe_r1.experience import Message
from observe_r1.ladder.addresses import read_image
from observe_r1.ladder.answer_cases import AnswerCase, answer_cases
from observe_r1.ladder.fingerprints import image_fingerprint, normalised_question, question_fingerprint
from observe_r1.ladder.images import StoredImage
from observe_r1.ladder.manifest import FILE_NAME
from observe_r1.ladder.sample import BadSample, Sample
from observe_r1.ladder.stored import StoredLadder, question_of
from observe_r1.ladder.tables import Row, read_rows
from observe_r1.normalisation import folded
from observe_r1.rewards.accuracy import AccuracyReward
from observe_r1.rewards.verification import Verdict


@dataclass(frozen=True)
class ContaminationOptions:
    """Which questions count as known from a benchmark.

    Args:
        benchmarks: Files (JSON, JSON Lines, parquet), folders of them, or ladders, with questions to stay away from.
        match: `either`: one image in common, or the same words; `both`: the same words with an image in common.
        min_question_words: The same words alone are a match from this length on: "Find x." is nobody's question.
    """

    benchmarks: list[str] = field(default_factory=list)
    match: Literal["either", "both"] = "either"
    min_question_words: int = 8


def screen(
    samples: Sequence[tuple[int, Sample[StoredImage] | BadSample]], reward: AccuracyReward
) -> list[dict[str, Any]]:
    """One record per sample: what it is compared by, and `reason` where it cannot be used."""
    records: list[dict[str, Any]] = []
    tried: list[tuple[int, Sample[StoredImage], AnswerCase]] = []
    for position, sample in samples:
        record: dict[str, Any] = {"position": position}
        records.append(record)
        try:
            if isinstance(sample, BadSample):
                raise sample
            question = question_of(sample)
            images = [image_fingerprint(image.data) for image in sample.images]
        except BadSample as bad:
            record |= {"reason": bad.reason, "detail": bad.detail}
            continue
        record |= {
            "id": sample.id,
            "question": normalised_question(question),
            "images": images,
            "same": question_fingerprint(question, images),
            "answer": folded(normalise(sample.answer)),
        }
        tried += [(len(records) - 1, sample, case) for case in answer_cases(sample.gold) if case.kind != "paraphrase"]
    verdicts = reward.verdicts([(sample.gold, case.completion) for _, sample, case in tried])
    for (number, sample, case), verdict in zip(tried, verdicts, strict=True):
        accepted, record = verdict is Verdict.CORRECT, records[number]
        if "reason" in record:
            continue
        # what is equal letter by letter is right without algebra: an unreadable gold shows at the other answers
        if verdict is Verdict.UNPARSEABLE_GOLD or (case.kind == "itself" and not accepted):
            detail = f"{sample.answer!r} against {case.answer!r}: {verdict.value}"
            record |= {"reason": "gold_unparseable", "detail": detail}
        elif accepted and not case.expected:
            record |= {"reason": "gold_accepts_wrong", "detail": f"{sample.answer!r} accepts {case.answer!r}"}
    return records


class Contamination:
    """The questions of benchmarks, by pixels and by words."""

    def __init__(self, options: ContaminationOptions) -> None:
        self.options = options
        self._images: dict[str, str] = {}  # fingerprint: benchmark
        self._questions: dict[str, str] = {}
        for name in options.benchmarks:
            for question, images in _benchmark(Path(name)):
                self._images |= dict.fromkeys(images, Path(name).name)
                if question:
                    self._questions[normalised_question(question)] = Path(name).name

    def match(self, question: str, images: Sequence[str]) -> str | None:
        """The benchmark that has the question, by its normalised words and the fingerprints of its images."""
        by_words = self._questions.get(question)
        by_image = next((self._images[image] for image in images if image in self._images), None)
        if self.options.match == "both":
            return by_image if by_words and by_image else None
        return by_image or (by_words if len(question.split()) >= self.options.min_question_words else None)


def drop_known(records: Iterator[dict[str, Any]], contamination: Contamination) -> Iterator[dict[str, Any]]:
    """The records, with a `reason` for each question that an earlier one or a benchmark has."""
    seen: dict[str, tuple[str, str]] = {}  # what makes questions the same: the first of them, without its words
    for record in records:
        if "reason" not in record:
            mine = (record["id"], record["answer"])
            first = seen.setdefault(record["same"], mine)
            benchmark = contamination.match(record["question"], record["images"])
            if benchmark is not None:
                record |= {"reason": "contaminated", "detail": f"in {benchmark}"}
            elif first is not mine:
                reason = "duplicate" if first[1] == mine[1] else "contradicting_duplicate"
                record |= {"reason": reason, "detail": f"same question and images as {first[0]}"}
        yield record


def _benchmark(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Question and image fingerprints of every row, as far as they can be read."""
    if (path / FILE_NAME).is_file():
        for _, sample in StoredLadder([path]).samples():
            if not isinstance(sample, BadSample):
                yield question_of(sample), _fingerprints(image.data for image in sample.images)
        return
    if not path.exists():
        raise ValueError(f"contamination.benchmarks names {path}, which does not exist")
    for row in read_rows(path):
        if isinstance(row.content, dict):
            yield _question(row.content), _fingerprints(_encoded(row))


def _question(row: dict[str, Any]) -> str:
    for name in ("question", "problem", "query", "prompt"):
        if isinstance(row.get(name), str):
            return str(row[name])
    messages: Sequence[Message] = row.get("messages") or ()
    texts = [message.get("content") for message in messages if isinstance(message, dict)]
    return "\n".join(text for text in texts if isinstance(text, str))


def _encoded(row: Row) -> Iterator[bytes]:
    """The images of a benchmark's row: whatever holds encoded bytes, or is a path in a column of images."""
    for name, value in row.content.items():
        for item in value if isinstance(value, list) else [value]:
            content = item.get("bytes") if isinstance(item, dict) else item
            if isinstance(content, bytes):
                yield content
            elif isinstance(item, str) and "image" in name.lower():
                try:
                    yield read_image(item, [row.file.parent])
                except (BadSample, OSError):
                    continue  # a description or a missing file: words remain to compare


def _fingerprints(images: Iterator[bytes]) -> list[str]:
    found = []
    for data in images:
        try:
            found.append(image_fingerprint(data))
        except BadSample:
            continue
    return found
