"""Answers to a gold whose verdict is known beforehand: what the verification is tried on before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from observe_r1.answers import Gold, gold_kind, normalise
from observe_r1.normalisation import folded
from observe_r1.quantities import read_quantity

CaseKind = Literal["itself", "paraphrase", "wrong"]

ADVERSARIAL = ("7919", "-0.31417", "qwertz", r"\sqrt{7919}", "x_{7919}")
"""Answers to no question, and no two of them equal: a gold that accepts two of them accepts anything."""

OPTIONS = "ABCDE"  # where a question does not say how many it has


@dataclass(frozen=True)
class AnswerCase:
    """The content of an answer block, and whether it is right."""

    kind: CaseKind
    form: str  # of the answer, to count by
    answer: str

    @property
    def expected(self) -> bool:
        return self.kind != "wrong"

    @property
    def completion(self) -> str:
        return completion_of(self.answer)


def completion_of(answer: str) -> str:
    """A well-formed completion with this answer."""
    return f"<observe>A figure.</observe><think>So it is.</think><answer>{answer}</answer>"


FORMAT_CASES = {
    "observe before think": ("<observe>o</observe><think>t</think><answer>{}</answer>", True),
    "observe within think": ("<think>t <observe>o</observe> t</think>\n<answer>{}</answer>\n", True),
    "no observe": ("<think>t</think><answer>{}</answer>", False),
    "answer only": ("<answer>{}</answer>", False),
    "answer twice": ("<observe>o</observe><think>t</think><answer>{0}</answer><answer>{0}</answer>", False),
    "think not closed": ("<observe>o</observe><think>t<answer>{}</answer>", False),
    "blank observe": ("<observe> </observe><think>t</think><answer>{}</answer>", False),
    "text behind": ("<observe>o</observe><think>t</think><answer>{}</answer> done", False),
}
"""Templates of completions, and whether the format reward has to accept them."""


def answer_cases(gold: Gold, others: Sequence[str] = ()) -> Iterator[AnswerCase]:
    """The gold itself, other forms of it, and wrong answers of the same kind.

    Args:
        gold: A judgeable one.
        others: Golds of other questions; texts that differ from this one are wrong answers to it.
    """
    yield AnswerCase("itself", "itself", gold.answer)
    forms = {"choice": _choice_forms, "number": _number_forms, "text": _text_forms, "math": _math_forms}
    wrong = {"choice": _wrong_choices, "number": _wrong_numbers, "text": _wrong_texts, "math": _wrong_math}
    kind = gold_kind(gold)
    if kind == "unjudgeable":
        return
    for form, answer in {**_wrapped(gold), **forms[kind](gold)}.items():
        yield AnswerCase("paraphrase", form, answer)
    for form, answer in wrong[kind](gold).items():
        yield AnswerCase("wrong", form, answer)
    for answer in others:
        # expressions that look different may be equal, so another question's is not known to be wrong
        if kind == "text" and folded(normalise(answer)) != folded(normalise(gold.answer)):
            yield AnswerCase("wrong", "gold of another question", answer)
    for answer in ADVERSARIAL:
        if folded(answer) != folded(normalise(gold.answer)):
            yield AnswerCase("wrong", "adversarial", answer)


def _wrapped(gold: Gold) -> dict[str, str]:
    plain = normalise(gold.answer)
    return {
        "white space": f"\n {gold.answer} ",
        "boxed": rf"\boxed{{{plain}}}",
        "trailing period": f"{plain}.",
        "bold": f"**{plain}**",
    }


def _text_forms(gold: Gold) -> dict[str, str]:
    plain = normalise(gold.answer)
    return {"upper case": plain.upper(), "LaTeX text": rf"\text{{{plain}}}"}


def _wrong_texts(gold: Gold) -> dict[str, str]:
    plain = normalise(gold.answer)
    return {"negated": f"not {plain}", "continued": f"{plain} and more"}


def _math_forms(gold: Gold) -> dict[str, str]:
    plain = normalise(gold.answer)
    return {"dollars": f"${plain}$", "display": rf"\[ {plain} \]"}


def _wrong_math(gold: Gold) -> dict[str, str]:
    plain = normalise(gold.answer)
    # adding one changes an expression, but neither infinity nor a list, a set or an equation
    is_expression = not any(sign in plain for sign in ("infty", "∞", ",", "=", "<", ">", "{,}", "\\in", "\\cup", ";"))
    return {"one more": f"({plain})+1"} if is_expression else {}


def _number_forms(gold: Gold) -> dict[str, str]:
    plain = normalise(gold.answer)
    number = read_quantity(plain, gold.unit)
    forms = {"dollars": f"${plain}$"}
    if number is None or number.value is None or number.unit or number.percent:
        return forms
    value = number.value
    if gold.unit is not None:
        forms["with its unit"] = f"{plain} {gold.unit}"
        return forms  # the unit may scale the value
    if value.denominator == 1:
        forms["decimal point"] = f"{value.numerator}.0"
        if abs(value) >= 1000:
            forms["thousands separators"] = f"{value.numerator:,}"
    else:
        forms["fraction"] = f"{value.numerator}/{value.denominator}"
        sign = "-" if value < 0 else ""
        forms["LaTeX fraction"] = rf"{sign}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"
        if (decimal := _decimal(value)) is not None:
            forms["decimal"] = decimal
    return forms


def _decimal(value: Fraction) -> str | None:
    """The exact decimal form, if there is a short one."""
    for digits in range(1, 10):
        scaled = value * 10**digits
        if scaled.denominator == 1:
            return f"{'-' if value < 0 else ''}{abs(scaled.numerator) // 10**digits}." + (
                f"{abs(scaled.numerator) % 10**digits:0{digits}d}"
            )
    return None


def _wrong_numbers(gold: Gold) -> dict[str, str]:
    number = read_quantity(normalise(gold.answer), gold.unit)
    if number is None or number.value is None:
        return {}
    value = number.value
    wrong = {"one more": value + 1}
    if value:
        # a power of ten may be another spelling of a unit or of a percentage, so not ten or a hundred times
        wrong |= {"negative": -value, "seven times": 7 * value}
    return {form: f"{v.numerator}/{v.denominator}" if v.denominator > 1 else str(v) for form, v in wrong.items()}


def _choice_forms(gold: Gold) -> dict[str, str]:
    letter, text = _option(gold)
    forms = {"letter": letter, "in parentheses": f"({letter})", "with a period": f"{letter}."}
    if text is not None:
        forms |= {"option text": text, "letter and text": f"{letter}. {text}"}
    return forms


def _wrong_choices(gold: Gold) -> dict[str, str]:
    letter, text = _option(gold)
    letters = OPTIONS if text is None else "".join(chr(ord("A") + index) for index in range(len(gold.choices)))
    same = folded(normalise(text or ""))
    options = dict(zip(letters, gold.choices, strict=False))
    wrong = [
        other
        for other in letters
        if other != letter and (other not in options or folded(normalise(options[other])) != same)
    ]
    return {f"letter {other}": other for other in wrong} | {
        f"text of {other}": f"{other}. {options[other]}" for other in wrong if other in options
    }


def _option(gold: Gold) -> tuple[str, str | None]:
    """The letter and the text of the right option."""
    plain = normalise(gold.answer)
    texts = [folded(normalise(choice)) for choice in gold.choices]
    if folded(plain) in texts:
        index = texts.index(folded(plain))
        return chr(ord("A") + index), gold.choices[index]
    letter = next(character for character in plain.upper() if character.isalpha())
    index = ord(letter) - ord("A")
    return letter, gold.choices[index] if index < len(gold.choices) else None
