"""The tag scanner, by table, against a slow reference, and for linear time."""

from __future__ import annotations

import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from observe_r1.answers import answer_content, is_well_formed

BEFORE = "<observe>a</observe><think>b</think><answer>c</answer>"
WITHIN = "<think>b<observe>a</observe></think><answer>c</answer>"


@pytest.mark.parametrize(
    "text",
    [
        BEFORE,
        WITHIN,
        f"\n {BEFORE}\n",
        "<observe>a</observe>\n<think>b</think>\n\n<answer>c</answer>",
        "<think><observe>a</observe>b</think> <answer>c</answer>",
        "<think>b<observe>a</observe>b</think> <answer>c</answer>",
        "<observe>a < b</observe><think>x <y> </p></think><answer>1 < 2</answer>",
    ],
)
def test_well_formed(text: str) -> None:
    assert is_well_formed(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "c",
        BEFORE + BEFORE,
        BEFORE + "<answer>c</answer>",
        "so: " + BEFORE,
        BEFORE + " done",
        BEFORE.replace("</think>", "</think> and"),
        BEFORE.replace("</observe>", "</observe>x"),
        BEFORE.replace(">a<", "> \n<"),
        BEFORE.replace(">b<", "><"),
        BEFORE.replace(">c<", "> <"),
        WITHIN.replace(">b<", ">\t<"),  # an observation is not thinking
        WITHIN.replace(">a<", "> <"),
        BEFORE.replace("</answer>", ""),
        BEFORE.replace("<observe>", ""),
        "<think>b</think><answer>c</answer>",
        "<think>b</think><observe>a</observe><answer>c</answer>",
        "<answer>c</answer><observe>a</observe><think>b</think>",
        "<think>b<observe>a</observe><observe>a</observe></think><answer>c</answer>",
        "<observe>a<think>b</think></observe><answer>c</answer>",
        BEFORE.replace("observe", "Observe"),
        "<think>b<observe>a</think></observe><answer>c</answer>",
    ],
)
def test_not_well_formed(text: str) -> None:
    assert not is_well_formed(text)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (BEFORE, "c"),
        ("<answer> 3 \n</answer>", "3"),
        ("<answer>1</answer><answer>2</answer>", "2"),
        ("<answer>1</answer><answer>2", "1"),
        ("<answer><answer>1</answer></answer>", "1"),
        ("<answer>1</answer></answer>", "1"),
        ("<answer></answer>", ""),
        ("<answer>1", None),
        ("1</answer>", None),
        ("</answer>1<answer>", None),
        ("1", None),
        ("", None),
    ],
)
def test_answer_content(text: str, content: str | None) -> None:
    assert answer_content(text) == content


PIECES = ["<observe>", "</observe>", "<think>", "</think>", "<answer>", "</answer>", "x", " ", "\n", "<", "</", ">"]
texts = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)


def reference_is_well_formed(text: str) -> bool:
    """The definition, by taking the text apart tag by tag."""
    if any(text.count(f"{slash}{tag}>") != 1 for tag in ("observe", "think", "answer") for slash in ("<", "</")):
        return False

    def inner(whole: str, tag: str) -> tuple[str, str, str] | None:
        before, found, rest = whole.partition(f"<{tag}>")
        body, closed, after = rest.partition(f"</{tag}>")
        return (before, body, after) if found and closed else None

    def only_text(*bodies: str) -> bool:
        return all(body.strip() and not re.search("</?(observe|think|answer)>", body) for body in bodies)

    thought = inner(text, "think")
    answered = inner(text, "answer")
    if thought is None or answered is None:
        return False
    before_think, think, after_think = thought
    answer = inner(after_think, "answer")
    if answer is None or answer[0].strip() or answer[2].strip() or not only_text(answer[1]):
        return False
    observed = inner(before_think, "observe")
    if observed is not None:
        return not observed[0].strip() and not observed[2].strip() and only_text(observed[1], think)
    observed = inner(think, "observe")
    return observed is not None and not before_think.strip() and only_text(observed[1], observed[0] + observed[2])


@given(texts)
def test_scanner_agrees_with_reference(text: str) -> None:
    assert is_well_formed(text) == reference_is_well_formed(text)


@given(
    st.permutations(["<observe>a</observe>", "<think>b</think>", "<answer>c</answer>"]), st.sampled_from(["", " ", "x"])
)
def test_only_one_order_is_well_formed(blocks: list[str], between: str) -> None:
    expected = blocks == ["<observe>a</observe>", "<think>b</think>", "<answer>c</answer>"] and between != "x"
    assert is_well_formed(between.join(blocks)) == expected


@given(texts)
def test_answer_content_is_a_part_without_answer_tags(text: str) -> None:
    content = answer_content(text)
    if content is None:
        assert re.search(r"<answer>((?!</?answer>).)*</answer>", text, re.DOTALL) is None
    else:
        last = re.findall(r"<answer>((?:(?!</?answer>).)*)</answer>", text, re.DOTALL)[-1]
        assert content == last.strip()


def count_calls(text: str) -> int:
    """Function calls, C functions included, made by reading a text: a measure of work that no clock disturbs."""
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        is_well_formed(text)
        answer_content(text)
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize(
    "piece", ["<think><observe>", "<answer>", "<answer></answer>", "<observe></think>x", "< <think"]
)
def test_work_grows_no_faster_than_the_text(piece: str) -> None:
    assert count_calls(piece * 4000) <= 10 * count_calls(piece * 400) + 100
    assert is_well_formed(piece * 20_000) is False
