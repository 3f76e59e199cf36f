"""Numbers as people write them, read exactly: separators, fractions, powers of ten, percent and trailing units."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_CHARACTERS = 2000  # longer text is not a number anybody answers with; keeps big-integer arithmetic cheap
MAX_EXPONENT = 1000  # 1e999999999 would fill the memory as an exact fraction

_NUMBER = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?:\ [0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
_QUANTITY = re.compile(
    rf"""(?P<sign>[+-]?)\s?[€£¥₹]?\s?
    (?:
        (?P<whole>[0-9]+)?\s?\\frac\s?
            (?:\{{(?P<latex_top>[+-]?{_NUMBER})\}}\s?\{{(?P<latex_bottom>[+-]?{_NUMBER})\}}
            | (?P<digit_top>[0-9])(?P<digit_bottom>[0-9]))
      | (?P<mixed>[0-9]+)\ (?P<mixed_top>[0-9]+)/(?P<mixed_bottom>[0-9]+)
      | (?P<top>{_NUMBER})\s?/\s?(?P<bottom>[+-]?{_NUMBER})
      | (?P<number>{_NUMBER})
        (?:[eE](?P<exponent>[+-]?[0-9]+)
        | \s?(?:\\times|\\cdot|\u00d7|·|\*|x)\s?10\s?\^\s?(?:\{{(?P<power>[+-]?[0-9]+)\}}|(?P<bare_power>[+-]?[0-9]+)))?
    )(?P<rest>.*)""",
    re.VERBOSE | re.DOTALL,
)

_PERCENT = {"%", "percent", "per cent", "percentage", "pct"}
_SPELLINGS = {
    "mm": "millimeter millimeters millimetre millimetres",
    "cm": "centimeter centimeters centimetre centimetres",
    "dm": "decimeter decimeters decimetre decimetres",
    "m": "meter meters metre metres",
    "km": "kilometer kilometers kilometre kilometres",
    "in": "inch inches",
    "ft": "foot feet",
    "yd": "yard yards yds",
    "mi": "mile miles",
    "mg": "milligram milligrams",
    "g": "gram grams",
    "kg": "kilogram kilograms kgs",
    "lb": "pound pounds lbs",
    "oz": "ounce ounces",
    "ms": "millisecond milliseconds",
    "s": "sec secs second seconds",
    "min": "mins minute minutes",
    "h": "hr hrs hour hours",
    "day": "days",
    "week": "weeks",
    "month": "months",
    "year": "years yr yrs",
    "ml": "mL milliliter milliliters millilitre millilitres",
    "l": "L liter liters litre litres",
    "°": "degree degrees deg",
    "°C": "℃ celsius",
    "°F": "℉ fahrenheit",
    "K": "kelvin",
    "rad": "radian radians",
    "Hz": "hertz",
    "N": "newton newtons",
    "J": "joule joules",
    "W": "watt watts",
    "V": "volt volts",
    "A": "amp amps ampere amperes",
    "Ω": "ohm ohms",
    "Pa": "pascal pascals",
    "kPa": "kilopascal kilopascals",
    "dollar": "dollars usd",
    "cent": "cents",
    "unit": "units",
}
_UNITS = {
    spelling: unit for unit, spellings in _SPELLINGS.items() for spelling in (unit, unit.casefold(), *spellings.split())
}
# letters that stay ambiguous in the other case: 5 M is not 5 metres, 3 n is not 3 newtons
for _letter in ("k", "n", "j", "w", "v", "a"):
    del _UNITS[_letter]
_COMPOUND = {"mph": "mi/h", "kph": "km/h", "kmh": "km/h"}
_POWERS = {"square": "^2", "sq": "^2", "sq.": "^2", "cubic": "^3", "cu": "^3"}
_FACTOR = re.compile(r"(?P<base>[^\s^0-9]+)\s?(?:\^?(?P<power>[23])|(?P<word>squared|cubed))?")
_UNIT_WORDS = re.compile(r"[^\W\d_]{3,}(?:[ -][^\W\d_]+){0,2}")
# words after a number that change its value or add another answer
# fmt: off
_NOT_UNITS = frozenset({
    "hundred", "thousand", "million", "billion", "trillion", "dozen", "half", "halves", "third", "thirds", "quarter",
    "quarters", "fourths", "fifths", "plus", "minus", "times", "over", "by", "divided", "squared", "cubed", "pow",
    "sqrt", "sin", "cos", "tan", "log", "exp", "mod", "infinity", "and", "or", "not", "but", "to",
})
# fmt: on


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number and what follows it."""

    value: Fraction | None  # of the figures alone: 50 for `50%`; None: undefined or too large to be exact (1/0, 1e9999)
    percent: bool = False
    unit: str = ""  # as `canonical_unit` writes it where it knows the unit, else as written; empty without one


def canonical_unit(text: str) -> str | None:
    """One spelling per unit: `square centimetres`, `sq cm` and `cm²` become `cm^2`; None for an unknown unit."""
    text = re.sub(r"[{}]", "", text).replace("²", "^2").replace("³", "^3").strip()
    text = _COMPOUND.get(text.casefold(), text)
    parts = re.split(r"\s*/\s*|\s+per\s+", text)
    factors = [_canonical_factor(part) for part in parts]
    known = [factor for factor in factors if factor is not None]
    return "/".join(known) if len(known) == len(factors) else None


def _canonical_factor(text: str) -> str | None:
    first, _, rest = text.partition(" ")
    power = _POWERS.get(first.casefold()) if rest else None
    match = _FACTOR.fullmatch(rest.strip() if power else text.strip())
    if match is None or (power and (match["power"] or match["word"])):
        return None
    base = match["base"]
    unit = _UNITS.get(base) or (_UNITS.get(base.casefold()) if len(base) > 1 else None)
    if unit is None:
        return None
    if match["power"]:
        power = f"^{match['power']}"
    elif match["word"]:
        power = "^2" if match["word"] == "squared" else "^3"
    return unit + (power or "")


def units_conflict(first: str, second: str) -> bool:
    """Whether both units are known and differ; missing and unknown units conflict with nothing."""
    known_first, known_second = canonical_unit(first), canonical_unit(second)
    return known_first is not None and known_second is not None and known_first != known_second


def read_quantity(text: str, unit: str | None = None) -> Quantity | None:
    """The number that normalised text consists of, None when the text is anything else.

    A unit may follow: one that `canonical_unit` knows, the given `unit`, or one to three words of which the first has
    three letters or more (`12 red apples`). Units of one letter need a space before them, `3m` is a product. Words that
    change the value (`2 million`) or add an answer (`2 or 3`) are no units, so such text is not a quantity.
    """
    if len(text) > MAX_CHARACTERS:
        return None
    match = _QUANTITY.fullmatch(text)
    if match is None:
        return None
    rest = match["rest"]
    trailing = rest.strip()
    if trailing.casefold() in _PERCENT:
        return Quantity(_value(match), percent=True)
    read = _read_unit(rest, trailing, unit)
    return None if read is None else Quantity(_value(match), unit=read)


def _read_unit(rest: str, trailing: str, expected: str | None) -> str | None:
    """The unit in what follows a number, None when it is not one."""
    if not trailing:
        return ""
    if expected is not None and trailing.casefold() == expected.strip().casefold():
        return trailing
    spaced = rest[0].isspace()
    unit = canonical_unit(trailing)
    if unit is not None:
        return unit if spaced or unit == "°" or len(trailing) > 1 else None
    words = trailing.casefold().replace("-", " ").split()
    if spaced and _UNIT_WORDS.fullmatch(trailing) and not _NOT_UNITS.intersection(words):
        return trailing
    return None


def _value(match: re.Match[str]) -> Fraction | None:
    whole = match["whole"] or match["mixed"]
    top = match["latex_top"] or match["digit_top"] or match["mixed_top"] or match["top"] or match["number"]
    bottom = match["latex_bottom"] or match["digit_bottom"] or match["mixed_bottom"] or match["bottom"] or "1"
    exponent = match["exponent"] or match["power"] or match["bare_power"] or "0"
    if len(exponent.lstrip("+-0")) > len(str(MAX_EXPONENT)) or abs(int(exponent)) > MAX_EXPONENT:
        return None
    divisor = _decimal(bottom)
    if divisor == 0:
        return None
    magnitude = _decimal(top) / divisor * Fraction(10) ** int(exponent)
    if whole is not None:
        magnitude += int(whole)
    return -magnitude if match["sign"] == "-" else magnitude


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", "").replace(" ", "").rstrip("."))


def same_number(gold: Quantity, prediction: Quantity, precision: int | None = None) -> bool:
    """Whether a predicted number is the gold number, exactly or within half a unit of the `precision`-th decimal.

    Units are not converted: with known, different units the answer is wrong, a unit that one side leaves out is not
    held against it. A percent sign on one side only may be read as a unit or as a hundredth: `50%` equals both `50`
    and `0.5`, since golds of percentage questions come in both forms. Percent and another unit conflict.
    """
    if gold.value is None or prediction.value is None:
        return False
    if gold.percent != prediction.percent and (gold.unit or prediction.unit):
        return False
    if units_conflict(gold.unit, prediction.unit):
        return False
    readings = [prediction.value]
    if gold.percent and not prediction.percent:
        readings.append(prediction.value * 100)
    elif prediction.percent and not gold.percent:
        readings.append(prediction.value / 100)
    tolerance = Fraction(0) if precision is None else Fraction(1, 2) / Fraction(10) ** precision
    return any(abs(gold.value - reading) <= tolerance for reading in readings)
