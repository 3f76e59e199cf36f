"""How expensive an answer looks before computer algebra touches it."""

from __future__ import annotations

import re

MAX_NESTING = 40  # math-verify takes seconds from about a thousand open parentheses on
MAX_POWER = 10_000  # larger exponents give numbers or polynomials that cannot be interrupted
MAX_FACTORIAL_DIGITS = 3

_BRACKETS = re.compile(r"[()\[\]{}]")
_LONG_NUMBER = re.compile(rf"[0-9]{{{MAX_FACTORIAL_DIGITS + 1},}}")
_SCIENTIFIC = re.compile(r"[0-9][eE][+-]?[0-9]{5,}")
_POWER_CHAIN = re.compile(r"\^([0-9]+)((?:\^[0-9]+)*)")
_BIG_OPERATORS = re.compile(r"\\(?:int|sum|prod|lim|binom)|\bmod\b")


def is_too_costly(latex: str) -> bool:
    """Whether an answer is refused unseen: deep nesting, towers and huge exponents, factorials of large operands.

    What it lets through is still bounded by the limits of the worker processes.
    """
    return _nesting(latex) > MAX_NESTING or _has_huge_power(latex) or _has_huge_factorial(latex)


def cost(latex: str) -> int:
    """A rank of answers by the time they may take, so that cheap ones are verified first."""
    operators = latex.count("^") + latex.count("!") + 5 * len(_BIG_OPERATORS.findall(latex))
    return len(latex) + 40 * operators + 10 * _nesting(latex)


def _nesting(text: str) -> int:
    depth = deepest = 0
    for bracket in _BRACKETS.finditer(text):
        depth += 1 if bracket.group() in "([{" else -1
        deepest = max(deepest, depth)
    return deepest


def _has_huge_power(text: str) -> bool:
    if _SCIENTIFIC.search(text):
        return True
    # without opening brackets a tower is a chain, whatever encloses its levels
    flat = re.sub(r"[)\]}]", "|", re.sub(r"[\s(\[{]", "", text.replace("**", "^")))
    for chain in _POWER_CHAIN.finditer(flat):
        power, *rest = [int(level[:6]) for level in chain.group()[1:].split("^")]
        if power > MAX_POWER or (rest and (len(rest) > 2 or not _is_small_power(power, rest))):
            return True
    return False


def _is_small_power(base: int, exponents: list[int]) -> bool:
    """Whether a power, or a tower of three levels, stays within `MAX_POWER`."""
    value = 1
    for level in reversed([base, *exponents]):
        if level > 1 and value > 13:  # 2^14 exceeds the limit
            return False
        value = level**value
        if value > MAX_POWER:
            return False
    return True


def _has_huge_factorial(text: str) -> bool:
    if "!" not in text:
        return False
    openings: list[int] = []
    previous = (0, 0)  # the span of the bracket pair that closed last
    for match in re.finditer(r"[()\[\]{}]|!", text):
        token = match.group()
        if token in "([{":
            openings.append(match.start())
        elif token != "!":
            previous = (openings.pop() if openings else 0, match.end())
        else:
            before = text[: match.start()].rstrip()
            number = text[len(before.rstrip("0123456789")) : len(before)]
            operand = number or text[slice(*previous)]
            in_exponent = before.removesuffix(number).rstrip("{ ").endswith("^")
            if in_exponent or before.endswith("!") or re.search(r"[\^!]", operand) or _LONG_NUMBER.search(operand):
                return True
    return False
