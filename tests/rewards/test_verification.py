"""Verification stays right, bounded and alive whatever it is asked."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from observe_r1.rewards import AnswerVerifier, Comparison, Verdict
from observe_r1.rewards.cost import cost, is_too_costly

SQUARE = "x^2+2x+1"
PATIENT = {"timeout_seconds": 20.0, "batch_timeout_seconds": 300.0}  # where others may want the cores, or all memory
HARMLESS = [Comparison(rf"\frac{{{i}\sqrt{{2}}}}{{3}}", rf"{i + i % 2}\sqrt{{2}}/3") for i in range(40)]
HARMLESS_VERDICTS = [Verdict.WRONG if i % 2 else Verdict.CORRECT for i in range(40)]


@pytest.fixture(scope="module")
def verifier() -> Iterator[AnswerVerifier]:
    shared = AnswerVerifier(workers=2, **PATIENT)
    yield shared
    shared.close()


def test_order_and_duplicates(verifier: AnswerVerifier) -> None:
    right, wrong = Comparison(SQUARE, "(x+1)^2"), Comparison(SQUARE, "(x+2)^2")
    unreadable = Comparison(r"\frac{1}{", "3")
    verdicts = verifier.verify([wrong, right, wrong, unreadable, right])
    assert verdicts == [Verdict.WRONG, Verdict.CORRECT, Verdict.WRONG, Verdict.UNPARSEABLE_GOLD, Verdict.CORRECT]
    assert verifier.verify([]) == []


@pytest.mark.parametrize(
    "latex",
    [
        "9^9^9^9",
        "9^{9^{9^9}}",
        "9**9**9",
        "((9^9))^{9^{9^{9}}}",
        "(10^8)!",
        "10^8!",
        "99999!",
        "3!!!",
        r"\left(10^8\right)!",
        "(x+1)^{100000}",
        "1e999999999",
        "(" * 50,
        "(" * 2000,
        "{[(" * 200,
    ],
)
def test_refused_unseen(latex: str) -> None:
    assert is_too_costly(latex)


@pytest.mark.parametrize(
    "latex",
    [
        "x^{2024}",
        "2^{3^2}",
        "10^{100}",
        "(2^3)^4",
        "5!",
        "(n-1)!",
        r"\frac{10!}{3!7!}",
        "((((x))))",
        "3e10",
        "3^45000!"[:3],
    ],
)
def test_not_refused(latex: str) -> None:
    assert not is_too_costly(latex)


def test_plain_answers_come_before_heavy_ones() -> None:
    assert cost(r"\frac{1}{2}") < cost("x^{99}+1") < cost(r"\sum_{k=1}^{99} k^{k}")


def test_hostile_batch_costs_seconds_and_harms_nobody() -> None:
    verifier = AnswerVerifier(workers=2, batch_timeout_seconds=15)  # 6 by default, for machines with nothing else to do
    verifier.verify(HARMLESS[:1])
    hostile = ["9^9^9^9", "(10^8)!", "(" * 20_000, "9" * 200_000, r"\frac{" * 30]
    hostile += [rf"(x+y+z+{i})^{{{900 + i}}}" for i in range(10)]
    hostile += [rf"(999 \cdot 99{i})! + {i}" for i in range(5)]
    hostile += [rf"\sum_{{k=1}}^{{10000000}} \frac{{1}}{{k^2+{i}}}" for i in range(5)]
    questions = [Comparison("x^{3}+1", text) for text in hostile]
    start = time.monotonic()
    verdicts = verifier.verify(questions + HARMLESS)
    assert time.monotonic() - start < 120  # 13 s on two idle cores
    assert Verdict.CORRECT not in verdicts[: len(hostile)]
    assert verdicts.count(Verdict.TIMEOUT) > 12
    assert verdicts[len(hostile) :] == HARMLESS_VERDICTS
    assert verifier.verify(HARMLESS) == HARMLESS_VERDICTS
    verifier.close()


def test_a_small_batch_limit_cuts_the_batch_off() -> None:
    impatient = AnswerVerifier(workers=1, batch_timeout_seconds=0.2)
    questions = [Comparison("x", rf"\sum_{{k=1}}^{{10000000}} \frac{{1}}{{k^2+{i}}}") for i in range(40)]
    start = time.monotonic()
    assert set(impatient.verify(questions)) == {Verdict.TIMEOUT}
    assert time.monotonic() - start < 60
    impatient.close()


def test_a_process_killed_by_the_system_is_replaced(verifier: AnswerVerifier) -> None:
    verifier.verify(HARMLESS[:2])
    killed = verifier.processes
    for process in killed:
        os.kill(process, signal.SIGKILL)
    for process in killed:
        os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)  # until it is gone; the verifier finds out by itself
    assert verifier.verify(HARMLESS) == HARMLESS_VERDICTS
    assert not set(killed) & set(verifier.processes)


def test_memory_is_bounded() -> None:
    small = AnswerVerifier(workers=1, memory_bytes=400 * 1024**2, **PATIENT)
    (verdict,) = small.verify([Comparison("x+1", "(x+y+z+w+v+u)^{200}")])
    assert verdict in (Verdict.OUT_OF_MEMORY, Verdict.WORKER_DIED, Verdict.WRONG, Verdict.TIMEOUT)
    assert small.verify(HARMLESS) == HARMLESS_VERDICTS
    small.close()


def test_a_start_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError('half an installation')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    broken = AnswerVerifier(workers=1, **PATIENT)
    with pytest.raises(RuntimeError, match=r"(?s)did not start 3 times.*half an installation"):
        broken.verify(HARMLESS[:1])
    assert broken.processes == []


def test_close_ends_the_processes_and_may_be_repeated() -> None:
    verifier = AnswerVerifier(workers=2, **PATIENT)
    verifier.verify(HARMLESS[:1])
    processes = verifier.processes
    assert len(processes) == 2
    verifier.close()
    verifier.close()
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    assert verifier.verify(HARMLESS[:1]) == HARMLESS_VERDICTS[:1]
    verifier.close()


def test_a_copy_has_the_settings_and_processes_of_its_own(verifier: AnswerVerifier) -> None:
    verifier.verify(HARMLESS[:1])
    for copied in (copy.deepcopy(verifier), pickle.loads(pickle.dumps(verifier))):
        assert (copied.workers, copied.timeout_seconds, copied.processes) == (2, 20.0, [])


def test_a_forked_child_leaves_the_processes_of_its_parent_alone(verifier: AnswerVerifier) -> None:
    verifier.verify(HARMLESS[:1])
    processes = verifier.processes
    child = os.fork()
    if child == 0:
        same = verifier.verify(HARMLESS[:2]) == HARMLESS_VERDICTS[:2]
        different = not set(processes) & set(verifier.processes)
        verifier.close()
        os._exit(0 if same and different else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert verifier.verify(HARMLESS) == HARMLESS_VERDICTS
    assert verifier.processes == processes


def test_a_script_without_a_main_guard_ends_and_leaves_no_process(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "from observe_r1.rewards import AnswerVerifier, Comparison\n"
        "print('once')\n"
        f"verifier = AnswerVerifier(workers=1, **{PATIENT})\n"
        "print(*verifier.verify([Comparison('x+1', '1+x')]), *verifier.processes)\n"
    )
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    once, answer = run.stdout.splitlines()
    verdict, process = answer.split()
    assert (once, verdict) == ("once", "correct")
    with pytest.raises(ProcessLookupError):
        os.kill(int(process), 0)


@pytest.mark.parametrize("name", ["workers", "timeout_seconds", "batch_timeout_seconds", "memory_bytes"])
def test_limits_must_be_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0"):
        AnswerVerifier(**{name: 0})
