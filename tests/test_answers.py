"""Gold answers, their kinds, and the predictions that are decided without computer algebra."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from observe_r1.answers import Gold, check_gold, fast_verdict, gold_kind, normalise, symbolic_gold, symbolic_prediction
from observe_r1.quantities import canonical_unit, read_quantity

CHOICES = ("10 cm", "12 cm", "14 cm", r"$\frac{\sqrt{3}}{2}$")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"answer": "3", "answer_type": "integer"}, "'integer'.*auto, text, choice, number, math"),
        ({"answer": " "}, "blank"),
        ({"answer": "$ $"}, "blank"),
        ({"answer": "3", "precision": -1}, "-1"),
        ({"answer": "12 cm", "answer_type": "choice"}, "'12 cm'"),
        ({"answer": "E", "answer_type": "choice", "choices": ("red", "blue")}, "'E'.*'red', 'blue'"),
    ],
)
def test_gold_refuses(arguments: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Gold(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gold", "kind"),
    [
        (Gold("red"), "text"),
        (Gold("Dark red."), "text"),
        (Gold(r"\text{Yes}"), "text"),
        (Gold("Figure 2"), "text"),
        (Gold("x"), "text"),
        (Gold("12", "text"), "text"),
        (Gold("C"), "choice"),
        (Gold("(b)"), "choice"),
        (Gold("b", "choice"), "choice"),
        (Gold("B", choices=CHOICES), "choice"),
        (Gold("12 cm", choices=CHOICES), "choice"),
        (Gold("12 cm"), "number"),
        (Gold("-1,234.5"), "number"),
        (Gold(r"$\frac{1}{2}$"), "number"),
        (Gold("50%"), "number"),
        (Gold("13 cm", choices=CHOICES), "number"),
        (Gold(r"\sqrt{2}"), "math"),
        (Gold("x - y"), "math"),
        (Gold("2 pi"), "math"),
        (Gold("α"), "math"),
        (Gold("(1, 2)"), "math"),
        (Gold("3m"), "math"),
        (Gold("1, 2"), "math"),
        (Gold("3 and 4"), "math"),
        (Gold(r"\frac{1}{"), "unjudgeable"),
        (Gold("1/0"), "unjudgeable"),
        (Gold("1e999999999"), "unjudgeable"),
        (Gold("red", "number"), "unjudgeable"),
        (Gold("1" * 2001), "unjudgeable"),
    ],
)
def test_gold_kind(gold: Gold, kind: str) -> None:
    assert gold_kind(gold) == kind
    assert (check_gold(gold) is not None) == (kind == "unjudgeable")


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        (r"\boxed{$\text{Red}$.}", "Red"),
        (r"first \boxed{3}, then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1", r"\boxed{1"),
        ("**12**", "12"),
        ("2**3", "2**3"),
        ("−3", "-3"),
        (r"3\text{cm}", "3 cm"),
        (r"\mathrm{x}_{\text{a}}", "x_{a}"),
        (r"\(\dfrac{1}{2}\)", r"\frac{1}{2}"),
        (r"1{,}000", "1,000"),
        (r"60^{\circ}", "60°"),
        (r"50\%", "50%"),
        (" a \n b ", "a b"),
        ('"yes."', "yes"),
        ("3.", "3"),
        ("3.5", "3.5"),
    ],
)
def test_normalise(text: str, normalised: str) -> None:
    assert normalise(text) == normalised


@pytest.mark.parametrize(
    ("gold", "prediction"),
    [
        ("3", "3.0"),
        ("3.0", "3"),
        ("0.5", "0.50"),
        ("1/2", "0.5"),
        ("0.5", r"\dfrac{1}{2}"),
        ("0.5", r"\frac12"),
        ("2.5", "2 1/2"),
        ("-2.5", r"-2\frac{1}{2}"),
        ("1000", "1,000"),
        ("1,234,567", "1234567"),
        ("1000", "1 000"),
        ("1000", r"1{,}000"),
        ("-3", "−3"),
        ("3", "+3"),
        ("3", "**3**"),
        ("3", r"$\boxed{3}$."),
        ("1500", "1.5e3"),
        ("300000000", r"3 \times 10^{8}"),
        ("12", "12 cm"),
        ("12 cm", "12"),
        ("12 cm", "12 centimeters"),
        ("12 cm^2", "12 square centimetres"),
        ("12", r"12\text{ cm}^2"),
        ("60", "60°"),
        ("60^\\circ", "60 degrees"),
        ("5 m/s", "5 meters per second"),
        ("12", "12 red apples"),
        ("$5", "5 dollars"),
        ("50%", "50 %"),
        ("50%", "50"),
        ("50%", "0.5"),
        ("0.5", "50%"),
        ("50", "50 percent"),
        ("red", "Red."),
        ("dark red", " Dark  red "),
        ("C", "(C)"),
        ("(1,2)", "(1, 2)"),
        (r"\sqrt{2}", r"$\sqrt{2}$"),
    ],
)
def test_right_without_algebra(gold: str, prediction: str) -> None:
    assert fast_verdict(Gold(gold), prediction) is True


@pytest.mark.parametrize(
    ("gold", "prediction"),
    [
        ("C", "12 cm"),
        ("C", "B"),
        ("C", "Cat"),
        ("red", "blue"),
        ("red", "red or blue"),
        ("3", "4"),
        ("3", "three"),
        ("3", ""),
        ("3", "$$"),
        ("0.333333", "1/3"),
        ("3", "3.0000000001"),
        ("12 cm", "12 m"),
        ("12 cm", "12 cm^2"),
        ("12 cm", "12%"),
        ("3", "1/0"),
        ("3", "1e999999999"),
        ("3", "-1e-999999999"),
        ("3", "9" * 1999),
        ("3", "3" * 2001),
        ("3", "the answer is 3"),
        ("2", "2 million"),
        ("1000", "1,00"),
    ],
)
def test_wrong_without_algebra(gold: str, prediction: str) -> None:
    verdict = fast_verdict(Gold(gold), prediction)
    assert verdict is False or (prediction == "1,00" and verdict is None)


@pytest.mark.parametrize(
    ("gold", "prediction"),
    [
        (r"\sqrt{2}", "1.41"),
        ("3", r"\sqrt{9}"),
        ("12", "12 or 13"),
        ("3", "3m"),
        ("6", "2 pi"),
        ("x+1", "1+x"),
        ("1, 2", "2, 1"),
        (r"\frac{1}{", "3"),
    ],
)
def test_undecided_without_algebra(gold: str, prediction: str) -> None:
    assert fast_verdict(Gold(gold), prediction) is None


@pytest.mark.parametrize(
    ("prediction", "verdict"),
    [
        ("B", True),
        ("b", True),
        ("(B)", True),
        ("[B]", True),
        ("B.", True),
        ("B)", True),
        ("B: 12 cm", True),
        ("(B) 12 cm", True),
        ("Option B", True),
        ("B. because it fits", True),
        ("12 cm", True),
        ("12CM", True),
        ("12", True),
        ("24/2", True),
        ("A", False),
        ("B: 10 cm", False),  # contradicts itself
        ("Z", False),
        ("10 cm", False),
        ("14", False),
        ("13", False),
        ("B, C", False),
        ("Bob", False),
        ("D", False),
    ],
)
@pytest.mark.parametrize("answer", ["B", "(B)", "12 cm"])
def test_choices(answer: str, prediction: str, verdict: bool) -> None:
    assert fast_verdict(Gold(answer, choices=CHOICES), prediction) is verdict


def test_an_option_that_is_an_expression_may_need_algebra() -> None:
    gold = Gold("D", choices=CHOICES)
    assert fast_verdict(gold, r"\sqrt{3}/2") is None
    assert fast_verdict(gold, r"\frac{\sqrt{3}}{2}") is True
    assert fast_verdict(gold, "12") is False
    assert symbolic_gold(gold) == r"\frac{\sqrt{3}}{2}"


def test_equal_options_are_interchangeable() -> None:
    assert fast_verdict(Gold("B", choices=("3", "3", "4")), "A") is True
    assert fast_verdict(Gold("B", choices=("0.5", "1/2", "4")), "0.50") is False  # names neither for certain


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        (Gold("3.14", precision=2), ["3.14", "3.145", "3.135", "22/7", "3.1400001"], ["3.1451", "3.1", "3"]),
        (Gold("3", precision=0), ["3.5", "2.5", "3"], ["3.51", "2.49"]),
        (Gold("50%", precision=0), ["50.4", "0.504"], ["0.51", "51"]),
        (Gold("12", unit="cm"), ["12", "12 cm", "12 centimetres"], ["12 m", "12%", "13 cm"]),
        (Gold("12", unit="widgets"), ["12", "12 Widgets"], ["13 widgets"]),
        (Gold("40", unit="%"), ["40", "40%", "0.4"], ["4%"]),
    ],
)
def test_precision_and_unit(gold: Gold, right: list[str], wrong: list[str]) -> None:
    assert [fast_verdict(gold, text) for text in right] == [True] * len(right)
    assert [fast_verdict(gold, text) for text in wrong] == [False] * len(wrong)


@pytest.mark.parametrize(
    ("gold", "latex"),
    [("1.5", r"\frac{3}{2}"), ("50%", r"\frac{1}{2}"), ("12 cm", "12"), (r"$\pi$", r"\pi"), ("-1/2", r"\frac{-1}{2}")],
)
def test_symbolic_gold(gold: str, latex: str) -> None:
    assert symbolic_gold(Gold(gold)) == latex


@pytest.mark.parametrize(
    ("text", "latex"),
    [("2√3", r"2\sqrt{3}"), ("sqrt(x+1)", r"\sqrt{x+1}"), ("2**3", "2^3"), ("60°", r"60^\circ"), ("2pi", r"2\pi")],
)
def test_symbolic_prediction(text: str, latex: str) -> None:
    assert symbolic_prediction(text) == latex


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("cm", "cm"),
        ("CM", "cm"),
        ("cm²", "cm^2"),
        ("sq ft", "ft^2"),
        ("meters squared", "m^2"),
        ("miles per hour", "mi/h"),
        ("mph", "mi/h"),
        ("M", None),
        ("apples", None),
        ("", None),
    ],
)
def test_canonical_unit(text: str, unit: str | None) -> None:
    assert canonical_unit(text) == unit


@given(st.fractions())
def test_every_spelling_of_a_fraction_is_the_same_number(value: Fraction) -> None:
    gold = Gold(f"{value.numerator}/{value.denominator}")
    sign = "-" if value < 0 else ""
    assert fast_verdict(gold, rf"{sign}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}") is True
    assert fast_verdict(gold, f"{value.numerator * 3}/{value.denominator * 3}") is True
    assert fast_verdict(gold, f"{value.numerator * 3 + 1}/{value.denominator * 3}") is False


@given(st.decimals(allow_nan=False, allow_infinity=False, places=4, min_value=-(10**12), max_value=10**12))
def test_thousands_separators_and_zeros_do_not_matter(value: object) -> None:
    assert fast_verdict(Gold(f"{value}"), f"{value:,}00") is True


@given(st.text(max_size=60))
def test_any_text_is_read_without_an_error(text: str) -> None:
    for gold in (Gold("3"), Gold("red"), Gold("B", choices=CHOICES), Gold(r"\sqrt{2}"), Gold("C")):
        assert fast_verdict(gold, text) in (True, False, None)
    read_quantity(text)
    symbolic_prediction(text)
    if normalise(text):
        gold = Gold(text)
        assert gold_kind(gold) == "unjudgeable" or fast_verdict(gold, text) is True


@given(st.text(alphabet="{}\\$*()[]!^_,. \"'`boxedtxfrac1", max_size=80))
def test_normalised_text_stays_when_normalised_again_or_shrinks(text: str) -> None:
    once = normalise(text)
    assert len(normalise(once)) <= len(once) + once.count("\\")
