"""`observe-r1 plan` as it is used: shipped configs, overlays, exit codes; and how configurations are read."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from observe_r1.loading import PolicyOptions
from observe_r1.module import ObserveR1
from observe_r1.plan import read_setup, read_strategy
from observe_r1.planning.devices import find_device, listed_gpu
from observe_r1.planning.options import PlanOptions
from observe_r1.planning.plan import make_plan
from observe_r1.planning.setup import Spread
from observe_r1.planning.terminal import show

CONFIGS = Path(__file__).parent.parent.parent / "configs"
TRAINER = {
    "accelerator": "gpu",
    "devices": "auto",
    "num_nodes": 1,
    "precision": None,
    "strategy": "auto",
    "accumulate_grad_batches": 1,
}


def test_the_quick_start_fits_and_is_written_for_machines(tmp_path: Path, command_line: Any) -> None:
    output = command_line(tmp_path)(
        *("plan", "--config", "quickstart.yaml", "--plan.completion_tokens", 16, "--plan.json", "plan.json")
    )
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["fits"] is True
    assert plan["device"]["kind"] == "cpu"
    assert plan["parameters"]["total"] == plan["parameters"]["trained"] == 899_008
    assert plan["peak_bytes"] == max(sum(phase["parts"].values()) for phase in plan["phases"])
    assert "Fits: " in output
    assert "nobody has measured it on a GPU" in output
    assert not (tmp_path / "data").exists()  # and nothing was started


def test_an_error_has_an_exit_code_of_its_own(tmp_path: Path, command_line: Any) -> None:
    output = command_line(tmp_path)("plan", "--config", "quickstart.yaml", "--plan.device", "abacus", expect=2)
    assert "observe-r1 plan: plan.device is 'abacus'. Choose one of a100-40gb" in output


def test_what_does_not_fit_is_an_exit_code_and_advice(tmp_path: Path, command_line: Any) -> None:
    small = ("--plan.completion_tokens", 16, "--data.prompts_per_rollout", 4)
    device = ("--plan.device", "l4", "--plan.device_memory_gb", 1, "--trainer.strategy", "ddp", "--plan.devices", 2)
    output = command_line(tmp_path)("plan", "--config", "quickstart.yaml", *small, *device, expect=1)
    assert "Does not fit" in output
    assert "2 × l4 of 1,012 MiB, ddp" in output
    assert "strategies/fsdp2.yaml" in output


@pytest.mark.slow
def test_seven_billion_parameters_without_gpu_deepspeed_or_download(tmp_path: Path, command_line: Any) -> None:
    """With ZeRO-3 on eight of 80 GB: 16 bytes for a parameter, an eighth of them on each, and they fit."""
    small = ("--plan.image_pixels", 200_704, "--plan.completion_tokens", 256, "--plan.device", "h100")
    configs = ("--config", "observe_r1_7b.yaml", "--config", "rollout/vllm_server.yaml")
    zero3 = ("--config", "strategies/deepspeed_zero3.yaml", "--plan.json", "plan.json")
    assert "Fits: " in command_line(tmp_path)("plan", *configs, *zero3, *small)
    parts = json.loads((tmp_path / "plan.json").read_text())["phases"][-1]["parts"]
    spread = ("weights", "gradients", "optimizer state", "master weights")
    assert sum(parts[name] for name in spread) == pytest.approx(16 / 8 * 8_292_166_656)


@pytest.mark.parametrize(
    ("overlay", "spread"),
    [
        ("ddp", Spread("ddp", 8)),
        ("fsdp2", Spread("fsdp2", 8)),
        ("deepspeed_zero2", Spread("zero2", 8, reduce_bucket=200_000_000, buckets=2)),
        ("deepspeed_zero3", Spread("zero3", 8, reduce_bucket=200_000_000, buckets=2)),
        (
            "deepspeed_zero3_offload",
            Spread("zero3", 8, offload_optimizer=True, offload_parameters=True, reduce_bucket=200_000_000, buckets=2),
        ),
    ],
)
def test_overlays_are_read_without_their_packages(overlay: str, spread: Spread) -> None:
    trainer = yaml.safe_load((CONFIGS / "strategies" / f"{overlay}.yaml").read_text())["trainer"]
    assert read_strategy(trainer["strategy"], 8) == spread


def test_names_of_strategies_are_lightning_s() -> None:
    assert read_strategy("auto", 1) == Spread()
    assert read_strategy("auto", 2).kind == "ddp"
    assert read_strategy("ddp_find_unused_parameters_true", 2).kind == "ddp"
    assert read_strategy("fsdp2", 4).kind == "fsdp2"
    offload = read_strategy("deepspeed_stage_2_offload", 4)
    assert (offload.kind, offload.offload_optimizer, offload.offload_parameters) == ("zero2", True, False)
    for unusable in ("fsdp", "nonsense"):
        with pytest.raises(ValueError, match=r"trainer\.strategy is"):
            read_strategy(unusable, 2)


@pytest.mark.parametrize(
    ("precision", "dtype", "compute"),
    [
        (None, torch.float32, torch.float32),
        ("bf16-true", torch.bfloat16, torch.bfloat16),
        ("bf16-mixed", torch.float32, torch.bfloat16),
        ("bf16", torch.float32, torch.bfloat16),
    ],
)
def test_precision_and_devices_are_read_as_lightning_does(precision: Any, dtype: Any, compute: Any) -> None:
    module = ObserveR1(PolicyOptions("quickstart"))
    trainer = {**TRAINER, "precision": precision, "devices": "0,1", "num_nodes": 2}
    setup = read_setup(module, 8, trainer, PlanOptions(), "cuda")
    assert (setup.dtype, setup.compute_dtype) == (dtype, compute)
    assert setup.spread == Spread("ddp", 4, copies_gradients=True)
    assert read_setup(module, 8, trainer, PlanOptions(devices=8, nodes=1), "cuda").spread.ranks == 8


@pytest.mark.parametrize("looked_at", [True, False], ids=["terminal", "file"])
def test_a_plan_is_readable_in_a_hundred_columns(looked_at: bool) -> None:
    module = ObserveR1(PolicyOptions("quickstart"))
    setup = read_setup(module, 8, {**TRAINER, "devices": 2}, PlanOptions(), "cuda")
    options = PlanOptions(completion_tokens=8, text_tokens=8)
    from observe_r1.planning.devices import find_device

    plan = make_plan(setup, find_device("rtx-4090"), options)
    written = io.StringIO()
    show(plan, Console(file=written, width=100, force_terminal=looked_at))
    lines = written.getvalue().splitlines()
    assert ("█" in written.getvalue()) == looked_at
    assert ("\x1b[" in written.getvalue()) == looked_at
    assert any("Fits: " in line for line in lines)
    if not looked_at:
        assert max(map(len, lines)) <= 100


@pytest.mark.parametrize(
    ("called", "memory", "listed"),
    [
        ("NVIDIA H100 80GB HBM3", 85_017_493_504, "h100"),
        ("NVIDIA H100 NVL", 100_000_000_000, "h100"),
        ("NVIDIA A100-SXM4-40GB", 42_298_834_944, "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", 85_051_572_224, "a100-80gb"),
        ("NVIDIA L40S", 47_697_362_944, "l40s"),
        ("NVIDIA GeForce RTX 4090", 25_386_352_640, "rtx-4090"),
        ("NVIDIA RTX 6000 Ada Generation", 50_000_000_000, "rtx-6000-ada"),
        ("NVIDIA L40", 47_000_000_000, None),
        ("NVIDIA RTX A1000 Laptop GPU", 4_000_000_000, None),
        ("NVIDIA GH200 480GB", 101_000_000_000, None),
    ],
)
def test_this_machine_s_gpu_is_known_by_whole_words(called: str, memory: int, listed: str | None) -> None:
    if listed is None:
        with pytest.raises(ValueError, match=r"is not listed: give --plan\.device"):
            listed_gpu(called, memory)
    else:
        assert listed_gpu(called, memory) == dataclasses.replace(find_device(listed), memory=memory)
