"""`observe-r1 audit`: are the golds of a ladder judged as they should be, before GPU time is spent on them?

Every gold is compared, by the verification that training uses, with itself, with other forms of it, and with wrong
answers of the same kind; and its completions go through the format check.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from observe_r1.answers import Gold, check_gold, gold_kind, is_well_formed
from observe_r1.ladder.answer_cases import FORMAT_CASES, AnswerCase, answer_cases
from observe_r1.ladder.sample import BadSample
from observe_r1.ladder.stored import StoredLadder
from observe_r1.rewards.accuracy import AccuracyReward
from observe_r1.rewards.verification import Verdict

GOLDS_PER_BATCH = 64
OTHER_GOLDS = 3  # of the same kind, as wrong answers
EXAMPLES = 5  # of each finding
UNDECIDED = (Verdict.TIMEOUT, Verdict.OUT_OF_MEMORY, Verdict.WORKER_DIED)


@dataclass(frozen=True)
class AuditLimits:
    """How much may be wrong with a ladder that is still worth training on; shares of 0 … 1.

    Args:
        unreadable: Samples that cannot be read, of all.
        unparseable: Golds that nothing can be compared with.
        false_negatives: Right answers in another form that are judged wrong.
        false_positives: Wrong answers that are judged right: what a policy learns to exploit.
        timeouts: Comparisons without a verdict.
    """

    unreadable: float = 0.01
    unparseable: float = 0.01
    false_negatives: float = 0.02
    false_positives: float = 0.001
    timeouts: float = 0.01


@dataclass
class SourceAudit:
    """What was tried on the golds of one source, and what went wrong."""

    golds: int = 0
    unparseable: int = 0
    right_answers: int = 0  # other forms of golds
    false_negatives: int = 0
    wrong_answers: int = 0
    false_positives: int = 0
    timeouts: int = 0
    format_errors: int = 0

    def add(self, other: SourceAudit) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class AuditReport:
    """The findings on a ladder."""

    sources: dict[str, SourceAudit] = field(default_factory=dict)
    unreadable: Counter[str] = field(default_factory=Counter)  # samples by reason
    forms: Counter[str] = field(default_factory=Counter)  # findings by the form of the answer
    examples: list[dict[str, str]] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)  # why not to train

    @property
    def exit_code(self) -> int:
        """0: train."""
        return int(bool(self.reasons))

    @property
    def total(self) -> SourceAudit:
        total = SourceAudit()
        for audit in self.sources.values():
            total.add(audit)
        return total


def audit_ladder(
    ladder: Path,
    *,
    accuracy: AccuracyReward | None = None,
    limits: AuditLimits = AuditLimits(),
    limit: int | None = None,
    report: Path | None = None,
) -> AuditReport:
    """Try the answer verification on every gold of a ladder; the exit code is 0 when nothing speaks against training.

    Args:
        ladder: Directory of a ladder.
        accuracy: The reward that decides what is correct; null: `AccuracyReward` as it is.
        limits: What is still acceptable.
        limit: Look at this many samples only, spread evenly.
        report: Write the findings to this JSON file.

    Raises:
        ValueError: The directory holds no ladder, or the limit is less than 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1, or left out to audit every sample")
    stored = StoredLadder([ladder])
    count = min(limit or len(stored), len(stored))
    positions = [number * len(stored) // count for number in range(count)]
    findings = audit(stored, positions, accuracy or AccuracyReward())
    findings.reasons = reasons_against(findings, limits)
    _print(findings, ladder)
    if report is not None:
        report.parent.mkdir(parents=True, exist_ok=True)
        sources = {name: vars(audit) for name, audit in findings.sources.items()}
        document = {**vars(findings), "sources": sources, "total": vars(findings.total), "limits": asdict(limits)}
        report.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return findings


def audit(ladder: StoredLadder, positions: Sequence[int], reward: AccuracyReward) -> AuditReport:
    """The findings on the samples at these positions; closes the reward."""
    findings = AuditReport()
    earlier: dict[str, deque[str]] = {}  # the last golds of each kind
    try:
        samples = _readable(ladder, positions, findings)
        while batch := list(islice(samples, GOLDS_PER_BATCH)):
            tried: list[tuple[str, str, Gold, AnswerCase]] = []
            for id, source, gold in batch:
                mine = findings.sources.setdefault(source, SourceAudit())
                mine.golds += 1
                mine.format_errors += _format_errors(gold, id, source, findings)
                others = earlier.setdefault(gold_kind(gold), deque(maxlen=OTHER_GOLDS))
                tried += [(id, source, gold, case) for case in answer_cases(gold, others)]
                if check_gold(gold) is None and gold.answer not in others:
                    others.append(gold.answer)
            verdicts = reward.verdicts([(gold, case.completion) for _, _, gold, case in tried])
            _count(tried, verdicts, findings)
    finally:
        reward.close()
    return findings


def reasons_against(findings: AuditReport, limits: AuditLimits) -> list[str]:
    """Which limits are exceeded, in words; none: train."""
    total = findings.total
    unreadable = sum(findings.unreadable.values())
    tried = total.golds + total.right_answers + total.wrong_answers
    shares = {
        "unreadable": (unreadable, total.golds + unreadable, "samples cannot be read"),
        "unparseable": (total.unparseable, total.golds, "golds cannot be compared with"),
        "false_negatives": (total.false_negatives, total.right_answers, "right answers are judged wrong"),
        "false_positives": (total.false_positives, total.wrong_answers, "wrong answers are judged right"),
        "timeouts": (total.timeouts, tried, "comparisons have no verdict"),
    }
    reasons = [
        f"{count} of {of} {what} ({count / of:.2%}, limits.{name} is {getattr(limits, name):.2%})"
        for name, (count, of, what) in shares.items()
        if of and count / of > getattr(limits, name)
    ]
    if total.format_errors:
        reasons.append(f"{total.format_errors} completions are judged wrongly by the format check")
    return reasons if total.golds else [*reasons, "the ladder has no sample that can be read"]


def _readable(ladder: StoredLadder, positions: Sequence[int], findings: AuditReport) -> Iterator[tuple[str, str, Gold]]:
    for position in track(positions, "Auditing", console=Console(stderr=True), transient=True):
        try:
            sample = ladder[position]
        except BadSample as bad:
            findings.unreadable[bad.reason] += 1
            _example(findings, bad.reason, str(position), "", bad.detail, "")
        else:
            yield sample.id, sample.source or "no source", sample.gold


def _count(
    tried: Sequence[tuple[str, str, Gold, AnswerCase]], verdicts: Sequence[Verdict], findings: AuditReport
) -> None:
    unparseable: set[str] = set()
    for (id, source, gold, case), verdict in zip(tried, verdicts, strict=True):
        # what is equal letter by letter is right without algebra: an unreadable gold shows at the other answers
        refused = case.kind == "itself" and verdict is not Verdict.CORRECT
        if id not in unparseable and (refused or verdict is Verdict.UNPARSEABLE_GOLD):
            unparseable.add(id)
            findings.sources[source].unparseable += 1
            _example(findings, "unparseable", id, source, gold.answer, verdict.value)
    for (id, source, gold, case), verdict in zip(tried, verdicts, strict=True):
        if id in unparseable or case.kind == "itself":
            continue
        mine = findings.sources[source]
        accepted = verdict is Verdict.CORRECT
        mine.right_answers += case.expected
        mine.wrong_answers += not case.expected
        if verdict in UNDECIDED:
            finding = "timeout"
            mine.timeouts += 1
        elif accepted and not case.expected:
            finding = "false positive"
            mine.false_positives += 1
        elif case.expected and not accepted:
            finding = "false negative"
            mine.false_negatives += 1
        else:
            continue
        findings.forms[f"{finding}: {case.form}"] += 1
        _example(findings, finding, id, source, gold.answer, case.answer)


def _format_errors(gold: Gold, id: str, source: str, findings: AuditReport) -> int:
    errors = 0
    for form, (template, expected) in FORMAT_CASES.items():
        text = template.format(gold.answer)
        if is_well_formed(text) is not expected:
            errors += 1
            findings.forms[f"format: {form}"] += 1
            _example(findings, "format", id, source, gold.answer, text)
    return errors


def _example(findings: AuditReport, finding: str, id: str, source: str, gold: str, answer: str) -> None:
    if sum(example["finding"] == finding for example in findings.examples) < EXAMPLES:
        example: dict[str, Any] = {"finding": finding, "id": id, "source": source, "gold": gold, "answer": answer}
        findings.examples.append(example)


def _print(findings: AuditReport, ladder: Path) -> None:
    console = Console()
    columns = ("source", "golds", "unparseable", "false negatives", "false positives", "time-outs", "format")
    table = Table(*columns, title=escape(str(ladder)))
    for column in table.columns[1:]:
        column.justify = "right"
    rows = [*sorted(findings.sources.items()), ("all", findings.total)]
    for name, audit in rows[-1:] if len(findings.sources) < 2 else rows:
        table.add_row(
            escape(name),
            str(audit.golds),
            str(audit.unparseable),
            f"{audit.false_negatives} of {audit.right_answers}",
            f"{audit.false_positives} of {audit.wrong_answers}",
            str(audit.timeouts),
            str(audit.format_errors),
        )
    console.print(table)
    for reason, count in findings.unreadable.most_common():
        console.print(f"{count} samples cannot be read: {reason}", markup=False)
    if findings.examples:
        examples = Table("finding", "sample", "gold", "answer", title="Examples")
        for example in findings.examples:
            examples.add_row(*(escape(example[name][:200]) for name in ("finding", "id", "gold", "answer")))
        console.print(examples)
    for reason in findings.reasons:
        console.print(f"Do not train on it: {reason}.", markup=False)
    if not findings.reasons:
        console.print("Nothing speaks against training on it.")
