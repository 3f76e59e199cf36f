"""The tiny policy: the shipped one loads like any other, answers, and reads and writes any text."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from observe_r1.answers import is_well_formed
from observe_r1.encoding import PromptEncoder, PromptOptions
from observe_r1.quickstart.annotations import annotate
from observe_r1.quickstart.pass_rates import judge
from observe_r1.quickstart.questions import SYSTEM_PROMPT, make_question
from observe_r1.quickstart.sampling import MAX_NEW_TOKENS, PolicySampler
from observe_r1.quickstart.tiny_policy import POLICY_DIRECTORY, TAGS, TURN_END, load_policy, save_policy
from observe_r1.quickstart.warm_start import supervised_batch

PROMPTS = [make_question("held_out", 0, index).prompt() for index in range(48)]


@pytest.fixture(scope="module")
def policy():
    return load_policy()


def test_plain_auto_classes_load_the_shipped_policy():
    model = AutoModelForImageTextToText.from_pretrained(POLICY_DIRECTORY)
    processor = AutoProcessor.from_pretrained(POLICY_DIRECTORY)
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert type(processor).__name__ == "Qwen2_5_VLProcessor"
    assert model.dtype == torch.float32
    assert model.config.text_config.vocab_size == len(processor.tokenizer)


def test_the_shipped_policy_is_small():
    assert sum(file.stat().st_size for file in POLICY_DIRECTORY.iterdir()) < 6e6


@pytest.mark.parametrize(
    "text", ["héllo wörld", "漢字 かな", "a\n\n b\t c  ", "🦉", "x² ≥ \\frac{1}{2}", SYSTEM_PROMPT]
)
def test_any_text_makes_the_round_trip(policy, text):
    tokenizer = policy[1].tokenizer
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_words_and_tags_of_the_quick_start_are_one_token_each(policy):
    tokenizer = policy[1].tokenizer
    for index in range(60):
        question = make_question("train", 5, index)
        assert len(tokenizer(question.text)["input_ids"]) == len(question.text.split()) + 1  # and the question mark
        text = question.response.text
        assert len(tokenizer(text + TURN_END)["input_ids"]) < MAX_NEW_TOKENS
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert all(len(tokenizer(tag)["input_ids"]) == 1 for tag in TAGS)


def test_a_picture_is_sixteen_visual_tokens(policy):
    encoder = PromptEncoder(policy[1], PromptOptions(system_prompt=None))
    for prompt in PROMPTS[:3]:
        assert int((encoder.encode(prompt).token_ids == policy[0].config.image_token_id).sum()) == 16


def test_supervised_labels_are_the_response_and_its_end(policy):
    questions = [make_question("train", 0, index) for index in range(6)]
    responses = [question.response.text for question in questions]
    inputs, labels = supervised_batch(policy[1], questions, responses)
    for row, response in enumerate(responses):
        labelled = labels[row] != -100
        assert policy[1].tokenizer.decode(labels[row][labelled]) == response + TURN_END
        assert torch.equal(inputs["input_ids"][row][labelled], labels[row][labelled])


def test_the_policy_keeps_the_format_mostly_and_is_right_sometimes(policy):
    judged = judge(PolicySampler(*policy), PROMPTS, 8)
    n = len(PROMPTS) * 8
    assert 0.75 < sum(one.n_well_formed for one in judged) / n < 1
    assert 0.3 < sum(one.n_correct for one in judged) / n < 0.75
    assert len({one.n_correct for one in judged}) >= 6  # of nine levels of difficulty
    assert all(1 < answered.n_tokens <= MAX_NEW_TOKENS for one in judged for answered in one.answered)


def test_a_saved_policy_loads_with_the_same_answers(policy, tmp_path):
    save_policy(*policy, tmp_path)
    again = load_policy(tmp_path)
    (first,), (second,) = (PolicySampler(*one, greedy=True)(PROMPTS[:1], 1) for one in (policy, again))
    assert first == second


def test_careless_annotations_fit_the_length_limit(policy):
    tokenizer = policy[1].tokenizer
    texts = [annotate(make_question("train", 0, index), random.Random(index)) for index in range(200)]
    assert max(len(tokenizer(text + TURN_END)["input_ids"]) for text in texts) < MAX_NEW_TOKENS
    assert any(not is_well_formed(text) for text in texts)
