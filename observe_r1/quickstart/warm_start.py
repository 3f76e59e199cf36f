"""Rebuilds the quick start's policy from random weights: supervised, on the careless annotator's responses.

python -m observe_r1.quickstart.warm_start OUTPUT
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn import functional

from observe_r1.quickstart.annotations import annotate
from observe_r1.quickstart.grounding import ground
from observe_r1.quickstart.pass_rates import Judged, judge
from observe_r1.quickstart.questions import FAMILIES, SYSTEM_PROMPT, Question, make_question
from observe_r1.quickstart.sampling import PolicySampler
from observe_r1.quickstart.tiny_policy import TURN_END, build_model, build_processor, save_policy

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

GROUNDING_STEPS = 300
STEPS = 2_000
BATCH = 32  # responses
LEARNING_RATE = 2e-3  # between a linear warm-up and a linear decay to nothing
WARM_UP_STEPS = 50
DECAY_SHARE = 0.4  # of the steps
N_EVALUATED = 240  # held-out questions
N_SAMPLES = 8  # per evaluated question


def supervised_batch(
    processor: Qwen2_5_VLProcessor, questions: Sequence[Question], responses: Sequence[str]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Model inputs, and labels [batch, tokens] that are -100 outside of the responses."""
    ended = [response + TURN_END for response in responses]
    prompts = [question.prompt() for question in questions]
    texts = processor.apply_chat_template([list(prompt.messages) for prompt in prompts], add_generation_prompt=True)
    inputs = dict(
        processor(
            text=[text + response for text, response in zip(texts, ended, strict=True)],
            images=[list(prompt.images) for prompt in prompts],
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
    )
    lengths = inputs["attention_mask"].sum(1)
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, response in enumerate(processor.tokenizer(ended)["input_ids"]):
        end = int(lengths[row])
        labels[row, end - len(response) : end] = inputs["input_ids"][row, end - len(response) : end]
    return inputs, labels


def train(seed: int = 0, steps: int = STEPS) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]:
    """A policy that imitates the careless annotator. No question is seen twice."""
    corpus = [make_question("warm_start", seed, index) for index in range(2_000)]
    texts = [SYSTEM_PROMPT, "system\nuser\nassistant", *(text for q in corpus for text in (q.text, q.response.text))]
    processor = build_processor(texts)
    model = build_model(processor.tokenizer, seed)
    ground(model, processor, seed, GROUNDING_STEPS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARM_UP_STEPS, (steps - step) / (DECAY_SHARE * steps))
    )
    model.train()
    for step in track(range(steps), "Warm start"):
        rng = random.Random(f"{seed}-{step}")
        questions = [make_question("warm_start", seed, step * BATCH + row) for row in range(BATCH)]
        inputs, labels = supervised_batch(processor, questions, [annotate(question, rng) for question in questions])
        logits = model(**inputs, use_cache=False).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval(), processor


def report(model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, seed: int) -> Table:
    """Pass rates on held-out questions per family, greedy and sampled, and the share of well-formed samples."""
    questions = [make_question("held_out", seed, index) for index in range(N_EVALUATED)]
    prompts = [question.prompt() for question in questions]
    greedy = judge(PolicySampler(model, processor, greedy=True), prompts, 1)
    sampled = judge(PolicySampler(model, processor, seed=seed), prompts, N_SAMPLES)
    table = Table("family", "greedy", "sampled", "format", "sometimes right", title=f"{N_EVALUATED} held-out questions")
    for family in (*FAMILIES, "all"):
        rows = [row for row, question in enumerate(questions) if family in (question.family, "all")]
        table.add_row(family, *_cells([greedy[row] for row in rows], [sampled[row] for row in rows]))
    return table


def _cells(greedy: Sequence[Judged], sampled: Sequence[Judged]) -> list[str]:
    n = len(greedy)
    shares = [
        sum(one.pass_rate for one in greedy) / n,
        sum(one.pass_rate for one in sampled) / n,
        sum(one.n_well_formed for one in sampled) / (n * N_SAMPLES),
        sum(0 < one.pass_rate < 1 for one in sampled) / n,
    ]
    return [f"{share:.1%}" for share in shares]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="directory the policy is written to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    model, processor = train(arguments.seed, arguments.steps)
    save_policy(model, processor, arguments.output)
    Console().print(report(model, processor, arguments.seed))


if __name__ == "__main__":
    main()
