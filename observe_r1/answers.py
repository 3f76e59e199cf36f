"""Gold answers, and what can be said about a prediction without computer algebra.

Rewards, benchmarks and the ladder importers share this module. It needs the standard library only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from observe_r1.normalisation import folded, latex_form, normalise
from observe_r1.quantities import Quantity, read_quantity, same_number
from observe_r1.tags import answer_content, is_well_formed

__all__ = [
    "MAX_ANSWER_CHARACTERS",
    "AnswerType",
    "Gold",
    "GoldKind",
    "answer_content",
    "check_gold",
    "fast_verdict",
    "gold_kind",
    "is_well_formed",
    "normalise",
    "option_index",
    "symbolic_gold",
    "symbolic_prediction",
]

MAX_ANSWER_CHARACTERS = 2000
"""A longer prediction is wrong without being read."""

AnswerType = Literal["auto", "text", "choice", "number", "math"]
GoldKind = Literal["text", "choice", "number", "math", "unjudgeable"]
MAX_PRECISION = 100  # decimals: to compare numbers in a billion of them would take forever


@dataclass(frozen=True, slots=True)
class Gold:
    """The right answer of a question and how predictions are compared with it.

    Raises:
        ValueError: on an unknown `answer_type`, a blank answer, an impossible `precision`, or an answer of type
            `choice` that is neither one of `choices` nor the letter of one.
    """

    answer: str
    answer_type: AnswerType = "auto"
    choices: tuple[str, ...] = ()  # option texts; A names the first
    precision: int | None = None  # decimals; right within half a unit of the last one, None: exact
    unit: str | None = None  # of the answer; predictions may leave it out

    def __post_init__(self) -> None:
        if self.answer_type not in get_args(AnswerType):
            raise ValueError(
                f"answer_type is {self.answer_type!r}; choose one of {', '.join(get_args(AnswerType))} "
                "(auto reads the type off the answer)"
            )
        if not normalise(self.answer):
            raise ValueError(f"answer is {self.answer!r}, which is blank; give the text of the right answer")
        if self.precision is not None and not 0 <= self.precision <= MAX_PRECISION:
            raise ValueError(
                f"precision is {self.precision!r:.40}; give 0 to {MAX_PRECISION} decimals, or None for exact"
            )
        if self.answer_type == "choice" and _chosen(self) is None:
            valid = ", ".join(map(repr, self.choices)) or "a letter such as 'B', as there are no choices"
            raise ValueError(
                f"answer {self.answer!r} of type choice is neither an option nor the letter of one; valid: {valid}"
            )


def gold_kind(gold: Gold) -> GoldKind:
    """How predictions are compared with a gold answer.

    - `choice`: the type says so, or the type is `auto` and the answer is an option, the letter of one, or without
      options a single upper-case letter or a letter in parentheses
    - `number`: a number with or without unit (`read_quantity`), unless the type is `text`
    - `text`: the type says so, or the type is `auto` and the answer is words: letters and plain punctuation, digits
      only beside a word of three letters (`Figure 2`)
    - `math`: everything else; math-verify compares
    - `unjudgeable`: no prediction can be compared with it, `check_gold` says why
    """
    return _kind_and_problem(gold)[0]


def check_gold(gold: Gold) -> str | None:
    """Why no prediction can be judged against a gold answer, None for a usable one.

    Only what can be known without computer algebra: whether math-verify reads a `math` gold is for `gold_problems` of
    `observe_r1.rewards` to say.
    """
    return _kind_and_problem(gold)[1]


def fast_verdict(gold: Gold, prediction: str) -> bool | None:
    """Whether the content of an answer block is right, None where only computer algebra can tell.

    Tried in this order: exact text (case and space folded), option letter or text, number. A gold of kind `text` or
    `choice` is always decided, except that an option which is an expression may need algebra. Predictions over
    `MAX_ANSWER_CHARACTERS` and blank ones are wrong. For an unjudgeable gold only exact text is decided.
    """
    if len(prediction) > MAX_ANSWER_CHARACTERS:
        return False
    predicted = normalise(prediction)
    if not predicted:
        return False
    kind = gold_kind(gold)
    if kind == "choice":
        return _choice_verdict(gold, predicted)
    if folded(predicted) == folded(normalise(gold.answer)):
        return True
    if kind == "text":
        return False
    if kind == "unjudgeable":
        return None
    number = read_quantity(predicted, gold.unit)
    expected = _gold_quantity(gold, normalise(gold.answer)) if kind == "number" else None
    if expected is not None and number is not None:
        return same_number(expected, number, gold.precision)
    return False if gold.answer_type != "math" and _is_words(predicted) else None


def symbolic_gold(gold: Gold) -> str:
    """What math-verify compares with: the option text of a choice, a number as an exact fraction, else the answer."""
    chosen = _chosen(gold) if gold_kind(gold) == "choice" else None
    answer = normalise(gold.answer) if chosen is None or chosen[1] is None else chosen[1]
    number = _gold_quantity(gold, answer)
    if number is None or number.value is None:
        return latex_form(answer)
    value = number.value / 100 if number.percent else number.value
    return str(value.numerator) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def symbolic_prediction(prediction: str) -> str:
    """What math-verify reads of the content of an answer block."""
    return latex_form(normalise(prediction))


def _kind_and_problem(gold: Gold) -> tuple[GoldKind, str | None]:
    if gold.answer_type == "text":
        return "text", None
    if gold.answer_type in ("choice", "auto") and _chosen(gold) is not None:
        return "choice", None
    answer = normalise(gold.answer)
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return "unjudgeable", f"the answer has {len(answer)} characters, more than {MAX_ANSWER_CHARACTERS}"
    number = _gold_quantity(gold, answer)
    if number is not None:
        if number.value is None:
            return "unjudgeable", f"the number {answer!r} is undefined or beyond exact arithmetic"
        return "number", None
    if _is_words(answer):
        if gold.answer_type == "auto":
            return "text", None
        if gold.answer_type == "number":
            return "unjudgeable", f"the answer {answer!r} is of type number but is words"
    if not _braces_balance(answer):
        return "unjudgeable", f"the braces of {answer!r} do not balance"
    return "math", None


def _gold_quantity(gold: Gold, answer: str) -> Quantity | None:
    """The number that a right answer states, with the unit of the question where the answer has none."""
    number = read_quantity(answer, gold.unit)
    if number is None or number.unit or number.percent or gold.unit is None:
        return number
    unit = normalise(gold.unit)
    return read_quantity(f"{answer} {unit}", unit) or number


# fmt: off
_MATHEMATICAL_WORDS = frozenset({
    "pi", "infinity", "sqrt", "frac", "sin", "cos", "tan", "cot", "sec", "csc", "log", "exp", "lim", "max", "min",
    "and", "or",  # join answers: `3 and 4` is a set
})
# fmt: on
_WORD_CHARACTERS = frozenset(" -',.:;()/&!?\"%°#")


def _is_words(normalised: str) -> bool:
    """Whether text is prose rather than mathematics: `dark red` and `Figure 2`, but not `x - y`, `2 pi` or `α`."""
    if not all(character in _WORD_CHARACTERS or _is_plain(character) for character in normalised):
        return False
    words = re.findall(r"[^\W\d_]+", normalised)
    if not words or any(word.casefold() in _MATHEMATICAL_WORDS for word in words):
        return False
    return any(len(word) >= 3 for word in words) or not re.search(r"[0-9\-/()]", normalised)


def _is_plain(character: str) -> bool:
    return character.isalnum() and not "\u0370" <= character <= "\u03ff" and character not in "²³½¼¾"


def _braces_balance(text: str) -> bool:
    depth = 0
    for brace in re.findall(r"\\.|[{}]", text):
        depth += {"{": 1, "}": -1}.get(brace, 0)
        if depth < 0:
            return False
    return depth == 0


_LETTER = re.compile(
    r"(?:option |choice )?"
    r"(?:[(\[](?P<enclosed>[a-z])[)\]](?P<after>$|[\s.:].*)|(?P<bare>[a-z])(?P<rest>$|[.:)].*))",
    re.IGNORECASE | re.DOTALL,
)
_SECOND_ANSWER = re.compile(r"(?:and|or)\b|[,/&]", re.IGNORECASE)


def _leading_letter(normalised: str) -> tuple[str, str] | None:
    """The option letter, in upper case, that an answer starts with, and the text after it; None without one."""
    match = _LETTER.fullmatch(normalised)
    if match is None:
        return None
    rest = (match["after"] or match["rest"] or "").lstrip(".:) ").strip()
    if _SECOND_ANSWER.match(rest):
        return None
    return (match["enclosed"] or match["bare"]).upper(), rest


def option_index(normalised: str, choices: tuple[str, ...]) -> int | None:
    """Which option an answer names, by its text or by a letter; None when it names none or contradicts itself."""
    texts = [folded(normalise(choice)) for choice in choices]
    answer = folded(normalised)
    if answer in texts:
        return texts.index(answer)
    named = _leading_letter(normalised)
    if named is None:
        return None
    index = ord(named[0]) - ord("A")
    if index >= len(choices):
        return None
    rest = folded(named[1])
    return None if rest in texts and rest != texts[index] else index


def _chosen(gold: Gold) -> tuple[str, str | None] | None:
    """The letter and the normalised text of the option that a gold names, the text None without known options."""
    answer = normalise(gold.answer)
    if gold.choices:
        index = option_index(answer, gold.choices)
        return None if index is None else (chr(ord("A") + index), normalise(gold.choices[index]))
    named = _leading_letter(answer)
    if named is None or named[1]:
        return None
    # a lone lower-case letter is a variable unless the sample says otherwise
    if gold.answer_type == "auto" and len(answer) == 1 and answer.islower():
        return None
    return named[0], None


def _choice_verdict(gold: Gold, predicted: str) -> bool | None:
    chosen = _chosen(gold)
    assert chosen is not None
    letter, text = chosen
    named = _leading_letter(predicted)
    if text is None:
        return named is not None and named[0] == letter
    index = option_index(predicted, gold.choices)
    if index is not None:
        return folded(normalise(gold.choices[index])) == folded(text)
    if named is not None:
        return False
    number = read_quantity(predicted, gold.unit)
    options = [read_quantity(normalise(choice), gold.unit) for choice in gold.choices]
    if number is not None and any(options):
        equal = {
            folded(normalise(choice))
            for choice, option in zip(gold.choices, options, strict=True)
            if option is not None and same_number(option, number, gold.precision)
        }
        if equal:
            return equal == {folded(text)}
    option = Gold(text, "auto", (), gold.precision, gold.unit)
    return fast_verdict(option, predicted) if gold_kind(option) in ("number", "math") else False
