"""The program of a verification process: reads comparisons from standard input, answers each with a verdict.

It runs as a script, apart from the package, so that starting one imports math-verify and nothing else. Each line of
input is a JSON list `[gold, prediction, decimals or null, CPU seconds]` of LaTeX texts; each line of output one word:
`ready` once, then `correct`, `wrong`, `unparseable_gold`, `timeout` or `out_of_memory`.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from functools import lru_cache
from typing import Any

import sympy  # type: ignore[import-untyped]
from math_verify import LatexExtractionConfig, parse, verify

FIRST_COMPARISONS = (  # build grammar and regular expressions, import what unequal answers need: most of a quick limit
    (r"\frac{1}{2}+x", "x+0.5"),
    (r"\sqrt{2}", r"\frac{\sqrt{3}}{2}"),
    ("x^2+1", "(x+2)^2"),
    (r"\{1,2\}", r"\{2,3\}"),
)
KILL_AFTER_SECONDS = 2  # CPU time past the limit at which the kernel ends a process that Python cannot interrupt


class _Interrupted(BaseException):
    """Outside `Exception`, so that math-verify and sympy let it through."""


def _interrupt(*_: object) -> None:
    raise _Interrupted


def _parse(latex: str) -> list[Any]:
    """The expressions math-verify reads, none when it cannot read the text.

    The delimiters make it read the answer as a whole instead of picking a number out of it.
    """
    config = [LatexExtractionConfig()]
    try:
        return list(parse(f"${latex}$", config, fallback_mode="no_fallback", parsing_timeout=None, raise_on_error=True))
    except MemoryError:
        raise
    except Exception:  # syntax errors of every layer, and recursion
        return []


@lru_cache(maxsize=4096)
def _parse_gold(latex: str) -> list[Any]:
    return _parse(latex)


def compare(gold: str, prediction: str, decimals: int | None) -> str:
    """The verdict on one prediction; `decimals` allows half a unit of that decimal between two real numbers."""
    golds = _parse_gold(gold)
    if not golds:
        return "unparseable_gold"
    predictions = _parse(prediction)
    if verify(golds, predictions, timeout_seconds=None, raise_on_error=True):
        return "correct"
    close = decimals is not None and any(_are_close(g, p, decimals) for g in golds for p in predictions)
    return "correct" if close else "wrong"


def _are_close(gold: object, prediction: object, decimals: int) -> bool:
    if isinstance(prediction, sympy.Eq):
        prediction = prediction.rhs
    if not isinstance(gold, sympy.Expr) or not isinstance(prediction, sympy.Expr):
        return False
    distance = sympy.N(gold - prediction, decimals + 15)
    return bool(distance.is_Float and abs(distance) <= sympy.Rational(1, 2 * 10**decimals))


def _limited(gold: str, prediction: str, decimals: int | None, cpu_seconds: float) -> str:
    used = resource.getrusage(resource.RUSAGE_SELF)
    total = int(used.ru_utime + used.ru_stime + cpu_seconds) + KILL_AFTER_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (total, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    try:
        try:
            # again every 0.1 s, should a destructor swallow the first one
            signal.setitimer(signal.ITIMER_PROF, cpu_seconds, 0.1)
            return compare(gold, prediction, decimals)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    except _Interrupted:
        return "timeout"
    except MemoryError:
        return "out_of_memory"
    except Exception:  # whatever the algebra trips over, the prediction is not equal to the gold
        return "wrong"


def main(memory_bytes: int) -> None:
    """Answers comparisons until the input ends."""
    # libraries print: what they write to standard output must not reach the parent
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, _interrupt)
    for meant_for_the_parent in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # it closes the input when it ends
        signal.signal(meant_for_the_parent, signal.SIG_IGN)
    for first in FIRST_COMPARISONS:
        compare(*first, 2)
    if sys.platform == "linux":  # elsewhere the limit is not enforced or refused
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        gold, prediction, decimals, cpu_seconds = json.loads(line)
        verdict = _limited(gold, prediction, decimals, cpu_seconds)
        print(verdict, file=answers, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
