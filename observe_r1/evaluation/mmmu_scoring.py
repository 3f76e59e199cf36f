"""How MMMU reads a response, and the unwrapping that `lenient` does before.

`named_letter`, `open_candidates` and `is_right_open` are `parse_multi_choice_response`, `parse_open_response` and
`eval_open` of the official repository (MMMU-Benchmark/MMMU, mmmu/utils/eval_utils.py): the same results for every
response, in linear time. `benchmarks/official_scores.py` compares both.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from contextlib import suppress

from observe_r1.answers import MAX_ANSWER_CHARACTERS, normalise, option_index
from observe_r1.evaluation.item import Item, Judgement, Outcome
from observe_r1.quantities import read_quantity

GUESSING_SEED = 42
"""Of the official scorer's guesses, drawn one after the other for the responses that name no option."""

MULTIPLE_CHOICE = "multiple-choice"

_STRIPPED_IN_TURN = ",.!?;:'"
_WORDS_FOR_OPTION_TEXTS = 5  # option texts are looked for in longer responses only
_BEFORE_AN_ANSWER = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = frozenset(":,.!?;'")

# The official patterns try every digit of a run as a beginning and give digits back one by one: quadratic and worse
# for a long run. Beginning at the first digit only, and giving nothing back, finds the same numbers.
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?(?<!\d)\d++(?:\.\d++)?[eE][+-]?\d++"),
    re.compile(r"-?(?:(?<!\d)\d++\.\d++|\.\d++|(?<!\d)\d++\b)(?![eE][+-]?\d)(?![,\d])"),
)

Candidate = str | float


def letters_of(choices: Sequence[str]) -> list[str]:
    """A, B, C … for the options."""
    return [chr(ord("A") + number) for number in range(len(choices))]


def named_letter(response: str, choices: Sequence[str]) -> str | None:
    """The option that the official parser reads from a response, None where it would guess.

    `(B)` goes before a `B` between spaces, that before option texts (in more than five words); of several options the
    one named last counts.
    """
    for character in _STRIPPED_IN_TURN:
        response = response.strip(character)
    padded = f" {response} "
    letters = letters_of(choices)
    for form in ("({})", " {} "):
        places = {letter: padded.rfind(form.format(letter)) for letter in letters}
        if named := _named_last(places):
            return named
    if len(response.split()) <= _WORDS_FOR_OPTION_TEXTS:
        return None
    lowered = padded.lower()
    return _named_last({letter: lowered.rfind(text.lower()) for letter, text in zip(letters, choices, strict=True)})


def _named_last(places: dict[str, int]) -> str | None:
    found = {letter: place for letter, place in places.items() if place >= 0}
    return max(found, key=found.__getitem__) if found else None


def open_candidates(response: str) -> list[Candidate]:
    """Everything the official parser takes for a possible answer to an open question, each once.

    The tails after words such as `answer`, and the numbers in them; the whole response where there is no such word.
    """
    tails = _tails(response)
    numbers = (number for tail in tails for pattern in _NUMBERS for number in pattern.findall(tail))
    return list(dict.fromkeys(form for text in (*tails, *numbers) for form in normal_forms(text)))


def _tails(response: str) -> list[str]:
    whole = response.strip().strip(".").lower()
    lines = whole.split("\n")
    tails = []
    for number, line in enumerate(lines):
        markers = (*_BEFORE_AN_ANSWER, "=") if number == len(lines) - 1 else _BEFORE_AN_ANSWER
        shortest = ""
        for tail in (line.rpartition(marker)[2].strip() for marker in markers if marker in line):
            if not shortest or len(tail) < len(shortest):  # an empty tail wins, and loses to the next one
                shortest = tail
        if shortest and shortest not in _TRIVIAL:
            tails.append(shortest)
    return tails or [whole]


def normal_forms(text: str) -> list[Candidate]:
    """The forms in which candidates and answers are compared.

    A number rounded to two decimals, or lower-case text; a single character gets a space before or after it, so that
    it is not found inside of words.
    """
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def is_right_open(answer: str | Sequence[str], candidates: Sequence[Candidate]) -> bool:
    """Whether a candidate contains a text answer or equals a number; `answer` may be several, any of which is right."""
    answers = [answer] if isinstance(answer, str) else answer
    forms = [form for text in answers for form in normal_forms(text)]
    texts = [form for form in forms if isinstance(form, str)]
    for candidate in candidates:
        if isinstance(candidate, str):
            if any(text in candidate for text in texts):
                return True
        elif candidate in forms:
            return True
    return False


def judge_strictly(response: str, item: Item) -> Judgement:
    """The official verdict, except that a multiple-choice response which names no option is not guessed for."""
    if item.question_type == MULTIPLE_CHOICE:
        return _judge_letter(named_letter(response, item.choices), item)
    return _judge_open(open_candidates(response), item)


def judge_leniently(response: str, item: Item) -> Judgement:
    """The official verdict after the answer was unwrapped.

    An option named exactly or by its letter (`b`, `B.`, `B: 12 cm`) is that option. An open answer is read as it is,
    without LaTeX and other wrapping, and as a number (`1/2`), and is right if one of these is.
    """
    if len(response) > MAX_ANSWER_CHARACTERS:
        return judge_strictly(response, item)
    text = normalise(response)
    if item.question_type == MULTIPLE_CHOICE:
        index = option_index(text, tuple(item.choices))
        letters = letters_of(item.choices)
        return _judge_letter(named_letter(response, item.choices) if index is None else letters[index], item)
    candidates = open_candidates(response) + open_candidates(text)
    quantity = read_quantity(text)
    if quantity is not None and quantity.value is not None:
        with suppress(OverflowError):
            candidates.append(round(float(quantity.value), 2))
    return _judge_open(list(dict.fromkeys(candidates)), item)


def guesses(items: Sequence[Item], outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The outcomes with a random option for every response that names none, as the official scorer draws them.

    The official scorer goes through the subjects in alphabetical order, so the items have to come in that order.
    """
    generator = random.Random(GUESSING_SEED)
    result = []
    for item, outcome in zip(items, outcomes, strict=True):
        if outcome is Outcome.NO_CANDIDATE:
            outcome = _judge_letter(generator.choice(letters_of(item.choices)), item).outcome
        result.append(outcome)
    return result


def _judge_letter(letter: str | None, item: Item) -> Judgement:
    if letter is None:
        return Judgement(Outcome.NO_CANDIDATE, None)
    return Judgement.of(letter in item.answer if isinstance(item.answer, list) else letter == item.answer, letter)


def _judge_open(candidates: Sequence[Candidate], item: Item) -> Judgement:
    return Judgement.of(is_right_open(item.answer, candidates), [str(candidate) for candidate in candidates])
