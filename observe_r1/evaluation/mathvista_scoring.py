"""How MathVista judges an extracted answer, and the unwrapping that `lenient` does before.

`official_prediction` is `normalize_extracted_answer` of the official repository (lupantech/MathVista,
evaluation/calculate_score.py): the same result for every input. `benchmarks/official_scores.py` compares both.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Sequence

from observe_r1.answers import MAX_ANSWER_CHARACTERS, normalise, option_index
from observe_r1.evaluation.item import Item, Judgement
from observe_r1.quantities import Quantity, read_quantity

_PARENTHESISED_LETTER = re.compile(r"\(([a-zA-Z])\)")
# a run of digits is entered at its beginning only, which keeps long runs linear
_LAST_NUMBER = re.compile(
    r"(?:(?<![\w)])-)?(?:(?<!\w)(?<!\d\.)(?:\d{1,3}(?:,\d{3})++(?!\d)|\d++)(?:\.\d++)?|(?<![\w.])\.\d++)"
    r"(?:[eE][+-]?\d++)?"
)


def official_prediction(extraction: object, item: Item, ignore_empty: bool = False) -> str | None:
    """What the official scorer compares with the answer; None where the extraction is no number.

    Args:
        extraction: Usually text; anything else is what an extractor may have returned.
        item: Its `question_type`, `answer_type`, `choices` and `precision` are used.
        ignore_empty: An empty extraction picks no option. Without it, it picks the option nearest to no text.

    Raises:
        ValueError: A multiple-choice question without options, or an answer type that MathVista does not have.
    """
    if item.question_type == "multi_choice":
        return _official_option(extraction, item.choices, ignore_empty)
    if item.answer_type == "integer":
        try:
            return str(int(float(extraction)))  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            return None
    if item.answer_type == "float":
        try:
            return str(round(float(extraction), int(item.precision)))  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            return None
    if item.answer_type == "list":
        return str(extraction)
    raise ValueError(
        f"question {item.id!r}: answer_type is {item.answer_type!r}; MathVista's free-form questions have one of "
        "integer, float, list"
    )


def judge_strictly(extraction: object, item: Item) -> Judgement:
    """The official verdict on an extracted answer."""
    prediction = official_prediction(extraction, item)
    return Judgement.of(prediction == item.answer, prediction)


def judge_leniently(extraction: str, item: Item) -> Judgement:
    """The official verdict after `unwrapped`."""
    return judge_strictly(unwrapped(extraction, item), item)


def unwrapped(text: str, item: Item) -> str:
    """An answer in the form that the official function reads.

    - multiple choice: the letter of the option that the text names, exactly or by letter (`b`, `B.`, `(B)`, `B: 12 cm`)
    - integer, float: the number without separators and unit, a fraction as a decimal; else the last number in the text
    - list: as Python prints it

    Text that is none of these, or longer than `MAX_ANSWER_CHARACTERS`, stays as it is.
    """
    if len(text) > MAX_ANSWER_CHARACTERS:
        return text
    if item.question_type == "multi_choice":
        index = option_index(normalise(text), tuple(item.choices))
        return text if index is None else chr(ord("A") + index)  # as text, an option named `A` would be the first one
    if item.answer_type == "list":
        return _python_list(text) or text
    return _number(text, item.unit) or text


def _official_option(extraction: object, choices: Sequence[str], ignore_empty: bool) -> str | None:
    text = extraction.strip() if isinstance(extraction, str) else str(extraction)
    if ignore_empty and not text:
        return None
    if not choices:
        raise ValueError("a multiple-choice question needs options")
    letter = _PARENTHESISED_LETTER.search(text)
    if letter is not None:
        text = letter[1].upper()
    if len(text) == 1 and 0 <= ord(text) - ord("A") < len(choices):
        return choices[ord(text) - ord("A")]
    distances = _distances(text, choices)
    return choices[distances.index(min(distances))]


def _distances(text: str, choices: Sequence[str]) -> list[int]:
    """Edit distances; insertion, deletion and substitution cost 1."""
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise ValueError("MathVista's scoring needs rapidfuzz: pip install 'observe-r1[eval]'.") from error
    return [Levenshtein.distance(text, choice) for choice in choices]


def _number(text: str, unit: str | None) -> str | None:
    normalised = normalise(text)
    quantity = read_quantity(normalised, unit and normalise(unit))
    if quantity is not None:
        return _decimal(quantity)
    found = _LAST_NUMBER.findall(normalised)
    return found[-1].replace(",", "") if found else None


def _decimal(quantity: Quantity) -> str | None:
    try:
        return None if quantity.value is None else str(float(quantity.value))
    except OverflowError:
        return None


def _python_list(text: str) -> str | None:
    try:
        with warnings.catch_warnings(action="ignore"):  # odd literals make the compiler warn
            value = ast.literal_eval(normalise(text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return str(list(value)) if isinstance(value, list | tuple) else None
