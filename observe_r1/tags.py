"""The tags of a completion, `<observe>`, `<think>` and `<answer>`, read in one linear pass.

Tags are matched literally: lower case, no attributes, no inner spaces. Anything else is ordinary text.
"""

from __future__ import annotations

import re
from itertools import islice

TAG = re.compile(r"</?(?:observe|think|answer)>")
_ANSWER_TAG = re.compile(r"</?answer>")

_OBSERVE_BEFORE = ["<observe>", "</observe>", "<think>", "</think>", "<answer>", "</answer>"]
_OBSERVE_WITHIN = ["<think>", "<observe>", "</observe>", "</think>", "<answer>", "</answer>"]


def is_well_formed(text: str) -> bool:
    """Whether a completion has the form the format reward asks for.

    Two forms are accepted, with nothing but white space between and outside the blocks:

    - `<observe>…</observe> <think>…</think> <answer>…</answer>`
    - `<think>… <observe>…</observe> …</think> <answer>…</answer>`

    Every tag occurs exactly once and no body is blank. In the second form the observation is not thinking: the
    `<think>` block must hold text of its own before or after the `<observe>` block. Nested, repeated or unclosed tags
    break the form. Takes time linear in the text up to the seventh tag, where reading stops.
    """
    matches = list(islice(TAG.finditer(text), len(_OBSERVE_BEFORE) + 1))
    tags = [match.group() for match in matches]
    if tags not in (_OBSERVE_BEFORE, _OBSERVE_WITHIN):
        return False
    ends = [0, *(match.end() for match in matches)]
    starts = [*(match.start() for match in matches), len(text)]
    filled = [bool(text[end:start].strip()) for end, start in zip(ends, starts, strict=True)]
    before, first, second, third, between, answer, after = filled
    if before or between or after or not answer:
        return False
    if tags == _OBSERVE_BEFORE:
        return first and not second and third
    return second and (first or third)


def answer_content(text: str) -> str | None:
    """The text inside the last complete `<answer>` block, stripped of outer white space; None without one.

    A block is complete when a closing tag follows an opening tag with no other answer tag between them, so nested
    openings yield the innermost block and stray or unclosed tags are passed over. An empty block yields "".
    """
    content: tuple[int, int] | None = None
    opened: int | None = None
    for match in _ANSWER_TAG.finditer(text):
        if match.group() == "<answer>":
            opened = match.end()
        elif opened is not None:
            content, opened = (opened, match.start()), None
    return None if content is None else text[slice(*content)].strip()
