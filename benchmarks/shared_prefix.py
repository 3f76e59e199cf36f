"""The shared-prefix forward against the forward that repeats the prompt: time, peak memory and what runs how often.

    python benchmarks/shared_prefix.py                 # about half an hour on 2 cores; a table
    python benchmarks/shared_prefix.py --json          # one JSON object per line
    python benchmarks/shared_prefix.py --only head     # part of it

Every case runs in a process of its own, alternately with the one it is compared with; ratios are taken within a round.
Log-probs and gradients of both sides have to agree before anything is timed. Exit status 1: a target was missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from paired import machine, paired_ratio, run_case, run_rounds
from random_models import medium_model, random_group
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from observe_r1.balancing import balance, cost_of
from observe_r1.experience import GroupSlice
from observe_r1.logprobs import LogprobHead
from observe_r1.padded import pad_rows
from observe_r1.peak_memory import PeakMemory
from observe_r1.policy import Policy
from observe_r1.token_cost import TokenCost

GROUP_SIZE = 8
THREADS = 2
HEAD_TOKENS, HEAD_HIDDEN, HEAD_VOCABULARY = 4096, 256, 151_936
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Shape:
    """Tokens of a prompt with one square image, and of its completions on average."""

    text_tokens: int
    side: int  # patches along an edge of the image; 4 patches make a token
    completion_tokens: int
    faster: float  # target
    memory: float  # target: padded / shared

    @property
    def name(self) -> str:
        return f"{self.text_tokens + self.side**2 // 4} + {self.completion_tokens} tokens"

    def lengths(self, spread: str) -> list[int]:
        """Of the completions: `ragged` from half to one and a half times the mean, as groups are, or all `equal`."""
        deviation = 0.5 if spread == "ragged" else 0.0
        steps = torch.linspace(-deviation, deviation, GROUP_SIZE)
        return [round(self.completion_tokens * (1 + float(step))) for step in steps]


SHAPES = {
    "1280": Shape(256, 64, 256, 6.0, 4.0),
    "512": Shape(112, 40, 256, 3.5, 3.0),
    "128": Shape(28, 20, 512, 1.7, 0.0),
}


def group_of(model: Any, shape: Shape, spread: str) -> list[GroupSlice]:
    # the placeholders of an image bring five text tokens along
    generator = torch.Generator().manual_seed(0)
    grid = (shape.side, shape.side)
    return [random_group(model, shape.text_tokens - 5, [grid], shape.lengths(spread), generator)]


def logprobs_of(model: Any, side: str) -> Callable[[list[GroupSlice]], Tensor]:
    """What a side computes for one group, [T].

    `shared`: the shared-prefix forward. `padded`: the prompt repeated, logits of all completion positions and their
    log-softmax, as the model gives them. `padded, our head`: the same with our log-prob head in place of the logits.
    """
    if side != "padded":
        policy = Policy(model.train(), pad_token_id=0, shares_prefixes=side == "shared")
        return lambda slices: policy(slices, 1.0).logprobs
    forbidden = list(Policy(model.train(), pad_token_id=0, shares_prefixes=False).forbidden_token_ids)

    def padded(slices: list[GroupSlice]) -> Tensor:
        (group,) = slices
        targets = pad_sequence(group.completions, batch_first=True)
        inputs = pad_rows(slices, pad_token_id=0).inputs
        logits = model(**inputs, use_cache=False, logits_to_keep=targets.shape[1]).logits
        logits[..., forbidden] = float("-inf")
        chosen = logits.log_softmax(-1).gather(2, targets[..., None])[..., 0]
        return torch.cat([row[: len(ids)] for row, ids in zip(chosen, group.completions, strict=True)])

    return padded


def forward_case(shape: Shape, spread: str, side: str) -> dict[str, Any]:
    """Seconds (median of two) and peak memory of a forward and backward over one group."""
    model = medium_model()
    logprobs, slices = logprobs_of(model, side), group_of(model, shape, spread)
    small = [GroupSlice(part.prompt, [ids[:8] for ids in part.completions]) for part in slices]
    logprobs(small).mean().backward()  # with the self-check, and every gradient allocated
    return measured(lambda: logprobs(slices).mean().backward(), repeats=2)


def measured(run: Callable[[], None], repeats: int) -> dict[str, Any]:
    """Median seconds of `run`, and the most memory it takes beyond what was in use."""
    with PeakMemory() as memory:
        run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "bytes": memory.peak - memory.before}


def head_case(side: str) -> dict[str, Any]:
    """Seconds (median of three) and peak memory of log-probs from hidden states, forward and backward."""
    torch.manual_seed(0)
    module = nn.Linear(HEAD_HIDDEN, HEAD_VOCABULARY, bias=False)
    hidden = torch.randn(HEAD_TOKENS, HEAD_HIDDEN, requires_grad=True)
    targets = torch.randint(HEAD_VOCABULARY, (HEAD_TOKENS,))
    nothing = torch.zeros(0, dtype=torch.long)
    head = LogprobHead(module, nothing, 1.0, chunk_tokens=512)

    def chunked() -> Tensor:
        return head(hidden, targets).logprobs

    def full() -> Tensor:
        return module(hidden).log_softmax(-1).gather(1, targets[:, None])[:, 0]

    logprobs: Callable[[], Tensor] = chunked if side == "shared" else full
    hidden.grad, module.weight.grad = torch.zeros_like(hidden), torch.zeros_like(module.weight)
    return measured(lambda: logprobs().mean().backward(), repeats=3)


def gate_case() -> dict[str, Any]:
    """Largest difference of log-probs and of any gradient between both sides, for every shape."""
    differences = {}
    for name, shape in SHAPES.items():
        found = {}
        for side in ("padded", "shared"):
            model = medium_model()
            logprobs = logprobs_of(model, side)(group_of(model, shape, "ragged"))
            logprobs.mean().backward()
            found[side] = [logprobs.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
        differences[name] = max(float((a - b).abs().max()) for a, b in zip(*found.values(), strict=True))
    return {"differences": differences, "agrees": all(value <= TOLERANCE for value in differences.values())}


def counts_case() -> dict[str, Any]:
    """How often things run in one step over two prompts with three images: per pass of policy and reference."""
    found: dict[str, Any] = {}
    for frozen in (False, True):
        model = medium_model()
        model.model.visual.requires_grad_(not frozen)
        policy, reference = Policy(model, 0), Policy(medium_model(), 0).requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        slices = [
            random_group(model, 20, [(8, 8), (8, 16)], [16] * GROUP_SIZE, generator),
            random_group(model, 30, [(16, 16)], [16] * GROUP_SIZE, generator),
        ]
        policy(slices, 1.0), reference(slices, 1.0)  # the self-checks
        images: Counter[str] = Counter()
        for name, side in (("policy", policy), ("reference", reference)):
            side.model.model.visual.register_forward_pre_hook(
                lambda _, args, kwargs, name=name, images=images: images.update({name: len(kwargs["grid_thw"])}),
                with_kwargs=True,
            )
        prompts = policy.encode_images([part.prompt for part in slices])
        encoded = [GroupSlice(prompt, part.completions) for prompt, part in zip(prompts, slices, strict=True)]
        with torch.no_grad():
            policy(encoded, 1.0)
            reference(encoded, 1.0)
        policy(encoded, 1.0).logprobs.sum().backward()
        passes = "features + old + reference + training" if frozen else "old + reference + training"
        found["frozen tower" if frozen else "trained tower"] = {"passes": passes, "images": 3, **images}
    return found


def balance_case() -> dict[str, Any]:
    """max / mean token cost of micro-batches on a realistic mix of lengths, with the sizes of Qwen2.5-VL-3B."""
    import transformers

    text = {"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**text, "intermediate_size": 11008, "vocab_size": 151_936},
        vision_config={"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16},
    )
    cost = TokenCost.of(config)
    found = {}
    for groups, parts in ((32, 4), (32, 8), (32, 16), (64, 32)):
        ratios = []
        for seed in range(20):
            generator = torch.Generator().manual_seed(seed)
            costs = []
            for _ in range(groups):
                prompt = int(torch.randint(200, 1500, (), generator=generator))
                lengths = (torch.randn(GROUP_SIZE, generator=generator) * 0.8 + 5.4).exp().clamp(8, 2048).int().tolist()
                costs.append(cost.group(prompt, [int(prompt * 0.7) * 4], lengths))
            shares = [cost_of(costs, items) for items in balance(costs, parts)]
            ratios.append(max(shares) * len(shares) / sum(shares))
        found[f"{groups} groups in {parts}"] = statistics.median(ratios)
    return found


def run_one(case: str) -> dict[str, Any]:
    """A case in this process: `forward:1280:ragged:shared`, `head:padded`, `gate`, `counts` or `balance`."""
    kind, *options = case.split(":")
    if kind == "forward":
        return forward_case(SHAPES[options[0]], options[1], options[2])
    if kind == "head":
        return head_case(options[0])
    return {"gate": gate_case, "counts": counts_case, "balance": balance_case}[kind]()


def measure(rounds: int, only: str | None) -> list[dict[str, Any]]:
    """Documents of everything measured, the gate first."""

    def command(case: str) -> list[str]:
        return [sys.executable, __file__, "--case", case]

    documents: list[dict[str, Any]] = [{"machine": machine(THREADS, ["torch", "transformers", "observe-r1"])}]
    gate = run_case(command("gate"), THREADS)
    documents.append({"gate": gate["differences"], "target": TOLERANCE, "reached": gate["agrees"]})
    if not gate["agrees"]:
        return documents
    forwards = [(name, spread) for name in SHAPES for spread in ("ragged", "equal")]
    for name, spread in [*forwards, ("head", "")]:
        if only and only not in (name, spread, "forward" if name in SHAPES else "head"):
            continue
        prefix = f"forward:{name}:{spread}" if name in SHAPES else name
        sides = ["padded", "shared", *(["padded, our head"] if spread == "ragged" else [])]
        results = list(run_rounds({side: command(f"{prefix}:{side}") for side in sides}, rounds, THREADS))
        documents += comparison(name, spread, results)
    if not only or only in "counts":
        counts = run_case(command("counts"), THREADS)
        trained, frozen = counts["trained tower"], counts["frozen tower"]
        once = trained["policy"] == 2 * trained["images"] and trained["reference"] == trained["images"]
        documents.append({"images through the tower": counts, "reached": once and frozen["policy"] == frozen["images"]})
    if not only or only in "balance":
        shares = run_case(command("balance"), THREADS)
        documents.append({"max / mean cost": shares, "target": 1.1, "reached": max(shares.values()) <= 1.1})
    return documents


def comparison(name: str, spread: str, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Time and memory of the padded side in multiples of the shared one, with what the targets ask for."""
    shape = SHAPES.get(name)
    label = f"forward + backward, {shape.name}" if shape else f"log-prob head, vocabulary {HEAD_VOCABULARY:,}"
    targets = {"seconds": shape.faster, "bytes": shape.memory} if shape else {"seconds": 1 / 1.3, "bytes": 10.0}
    if spread == "equal":  # the least favourable lengths: for information
        label, targets = f"{label}, all equal", dict.fromkeys(targets, 0.0)
    documents = []
    for what, target in targets.items():
        ratio = paired_ratio(f"{label}: {what}", results, "padded", "shared", lambda r, w=what: r[w], target)
        medians = {side: statistics.median(r[side][what] for r in results) for side in results[0]}
        documents.append({**ratio.to_document(), "medians": medians})
    return documents


def show(documents: list[dict[str, Any]]) -> None:
    console = Console()
    console.print(documents[0]["machine"])
    table = Table("measured", "padded", "padded, our head", "shared", "ratio", "target", "")
    for document in documents[1:]:
        verdict = "[green]reached" if document["reached"] else "[red]missed"
        if "ratio" in document:
            unit, scale = ("s", 1.0) if "seconds" in document["ratio"] else ("MB", 1e-6)
            medians = document["medians"]
            values = [
                f"{medians[side] * scale:,.2f} {unit}" if side in medians else ""
                for side in ("padded", "padded, our head", "shared")
            ]
            target = f"≥ {document['target']:.2f}" if document["target"] else ""
            table.add_row(document["ratio"], *values, f"{document['median']:.2f}", target, verdict)
        else:
            name = next(iter(document))
            values = "\n".join(f"{key}: {value}" for key, value in document[name].items())
            table.add_row(name, values, "", "", "", str(document.get("target", "")), verdict)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument("--only", help="1280, 512, 128, ragged, equal, forward, head, counts or balance")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run_one(options.case)))
        return
    documents = measure(options.rounds, options.only)
    if options.json:
        print("\n".join(json.dumps(document) for document in documents))
    else:
        show(documents)
    sys.exit(not all(document.get("reached", True) for document in documents))


if __name__ == "__main__":
    main()
