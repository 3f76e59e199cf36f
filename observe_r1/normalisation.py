"""Answers without their wrapping: LaTeX, Markdown and Unicode variants of the same text brought together."""

from __future__ import annotations

import re
from functools import lru_cache

_CHARACTERS = str.maketrans(
    {
        "\u2212": "-",  # minus sign
        "\ufe63": "-",  # small hyphen-minus
        "\uff0d": "-",  # full-width hyphen-minus
        "\u2044": "/",  # fraction slash
        "\uff0f": "/",
        "\uff0c": ",",
        "\uff0e": ".",
        "\uff1a": ":",
        "\uff08": "(",
        "\uff09": ")",
        "\uff05": "%",
        "\uff1d": "=",
        "\u00ba": "°",  # masculine ordinal
        "\u201c": '"',
        "\u201d": '"',
        "\u2019": "'",
    }
)
_REWRITES = [
    (re.compile(r"\\?\$|\\[()\[\]]|\\(?:left|right|displaystyle)(?![A-Za-z])|\\!"), ""),
    (re.compile(r"\\[,;: ]|\\q?quad(?![A-Za-z])|~"), " "),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\^\s?(?:\{\s?\\circ\s?\}|\\circ)|\\degree(?![A-Za-z])"), "°"),
    (re.compile(r"(?<![\w)])\*\*([^*]+)\*\*(?![\w(])"), r"\1"),
    (re.compile(r"\s+"), " "),
]
_BRACES = re.compile(
    r"(?P<wrapper>\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mathsf|mbox|bm|boldsymbol)\s*\{)"
    r"|\\.|[{}]",
    re.DOTALL,
)
_BOXED = re.compile(r"\\f?boxed\s*\{")
_QUOTES = {'"': '"', "'": "'", "`": "`"}


@lru_cache(maxsize=1024)  # a gold answer is normalised when it is read and for every completion
def normalise(text: str) -> str:
    r"""An answer without its wrapping: `\boxed{$\text{Red}$.}` becomes `Red`.

    Of several `\boxed{}` the last counts. Math delimiters, font commands, bold marks, outer quotes, a trailing period
    and LaTeX spacing go; minus signs, degree signs, full-width punctuation and white space are unified. Case stays.
    """
    text = _unwrapped(_last_boxed(text.translate(_CHARACTERS)))
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = text.strip().rstrip(".\u3002 ")
    while len(text) > 2 and _QUOTES.get(text[0]) == text[-1]:
        text = text[1:-1].strip().rstrip(".\u3002 ")
    return text


def _last_boxed(text: str) -> str:
    """The content of the last `\\boxed{}` whose braces balance, the whole text without one."""
    start = max((opening.end() for opening in _BOXED.finditer(text)), default=None)
    if start is None:
        return text
    depth = 1
    for match in _BRACES.finditer(text, start):
        if match.group() == "}":
            depth -= 1
        elif match.group() == "{" or match["wrapper"]:
            depth += 1
        if depth == 0:
            return text[start : match.start()]
    return text


def _unwrapped(text: str) -> str:
    """The text without font commands; a space keeps `3\\text{cm}` two words."""
    parts: list[str] = []
    opened: list[bool] = []  # for each open brace: whether a font command opened it
    end = 0
    for match in _BRACES.finditer(text):
        parts.append(text[end : match.start()])
        end = match.end()
        token = match.group()
        if match["wrapper"]:
            opened.append(True)
            parts.append(" " if text[match.start() - 1 : match.start()].isdigit() else "")
        elif token == "}" and opened and opened.pop():
            continue
        else:
            if token == "{":
                opened.append(False)
            parts.append(token)
    return "".join([*parts, text[end:]])


def folded(normalised: str) -> str:
    """Normalised text in the form that exact comparison uses: no case, one space, none before a comma."""
    return re.sub(r" ?, ?", ", ", " ".join(normalised.split())).casefold()


_SYMBOLS = [
    (re.compile("√ ?([0-9]+|[A-Za-z])"), r"\\sqrt{\1}"),
    (re.compile(r"√ ?\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"\bsqrt ?\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"(?<![A-Za-z\\])pi(?![A-Za-z])"), r"\\pi "),
    (re.compile(r"(?<!\\)%"), r"\\%"),
]
_LATEX_CHARACTERS = str.maketrans(
    {
        "°": r"^\circ ",
        "∞": r"\infty ",
        "∠": r"\angle ",
        "△": r"\triangle ",
        "π": r"\pi ",
        "θ": r"\theta ",
        "\u03b1": r"\alpha ",
        "β": r"\beta ",
        "\u00d7": r"\times ",
        "·": r"\cdot ",
        "÷": r"\div ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "±": r"\pm ",
        "\u222a": r"\cup ",
        "∩": r"\cap ",
        "²": "^2",
        "³": "^3",
        "½": r"\frac{1}{2}",
        "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}",
    }
)


def latex_form(normalised: str) -> str:
    """Normalised text with plain-text mathematics (`2√3`, `60°`, `x**2`) written as the LaTeX math-verify reads."""
    for pattern, replacement in _SYMBOLS:
        normalised = pattern.sub(replacement, normalised)
    return normalised.translate(_LATEX_CHARACTERS).strip()
