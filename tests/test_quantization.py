"""Adapters above 4-bit weights: real bitsandbytes on the CPU, against its own arithmetic and transformers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from transformers import AutoModelForImageTextToText, AutoProcessor

from observe_r1.checkpoint import unsaved
from observe_r1.loading import LoraOptions, PolicyOptions, load_policy, locate
from observe_r1.policy import Policy
from observe_r1.quickstart.questions import make_question
from observe_r1.strategies import FSDP2, load_models

from .test_export import TRAINING
from .test_resume import assert_equal, final_state

LORA = LoraOptions(4, 8, ["q_proj", "down_proj"])
QLORA = PolicyOptions("quickstart", lora=LORA, quantization="nf4")


@pytest.fixture
def policy() -> Policy:
    """With adapters that do something."""
    pytest.importorskip("bitsandbytes")
    policy = load_policy(QLORA)
    torch.manual_seed(0)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return policy


def question(directory: str | Path) -> dict[str, torch.Tensor]:
    prompt = make_question("held_out", seed=5, index=0).prompt()
    processor = AutoProcessor.from_pretrained(directory)
    parts = [*({"type": "image"} for _ in prompt.images), {"type": "text", "text": "How many shapes are red?"}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    return dict(processor(text=[text], images=list(prompt.images), return_tensors="pt"))


def test_streamed_weights_are_the_dequantised_base_with_adapters_merged(policy: Policy) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    adapters = {name: weight for name, weight in policy.named_parameters() if "lora_" in name}
    plain = dict(load_policy(PolicyOptions("quickstart")).named_weights())
    streamed = dict(policy.named_weights())
    assert streamed.keys() == plain.keys()
    assert policy.weight_shapes() == {name: (weight.shape, weight.dtype) for name, weight in streamed.items()}
    quantised = 0
    for name, weight in plain.items():
        expected = weight.detach()
        if ".layers." in name and name.endswith("proj.weight"):
            expected = dequantize_4bit(*quantize_4bit(expected, quant_type="nf4", compress_statistics=True))
            assert not torch.equal(expected, weight)
            quantised += 1
        layer = name.removeprefix("model.").removesuffix(".weight")
        a, b = (next((w for n, w in adapters.items() if f"{layer}.lora_{part}" in n), None) for part in "AB")
        if a is not None and b is not None:
            expected = expected + (b @ a).detach() * (8 / 4)
        torch.testing.assert_close(streamed[name], expected, rtol=1e-6, atol=1e-6)
    assert quantised == 3 * 7  # no vision tower, no output layer
    assert {name for name in policy.state_dict() if "lora_" in name} == policy.state_dict().keys() - unsaved(policy)


@torch.no_grad()
def test_without_adapters_it_is_the_dequantised_model(policy: Policy, tmp_path: Path) -> None:
    """The model that is trained computes what the weights say that it streams, and so does its reference."""
    policy.eval()
    policy.save_pretrained(tmp_path)
    inputs = question(locate("quickstart"))
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert getattr(merged.config, "quantization_config", None) is None
    torch.testing.assert_close(merged(**inputs).logits, policy.model(**inputs).logits, rtol=1e-4, atol=1e-4)
    base = load_policy(QLORA).eval()  # adapters begin as zero
    with policy.adapters_off():
        assert torch.equal(policy.model(**inputs).logits, base.model(**inputs).logits)


@pytest.mark.slow
@torch.no_grad()
def test_trained_resumed_and_exported(tmp_path: Path, tiny_ladder: Path, command_line: Any) -> None:
    """Resumed between two optimizer steps: the same bits. The export needs no bitsandbytes."""
    pytest.importorskip("bitsandbytes")
    arguments = (*TRAINING, "--model.policy.quantization=nf4", "--trainer.max_steps=3", f"--data.ladder={tiny_ladder}")
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole, parts = command_line(tmp_path / "whole"), command_line(tmp_path / "parts")
    whole(*arguments)
    parts(*arguments, "--trainer.max_steps=2")
    parts(*arguments, "--ckpt_path=last")
    state = final_state(tmp_path / "parts")
    uninterrupted = final_state(tmp_path / "whole")
    for part in ("state_dict", "optimizer_states"):
        assert_equal(state[part], uninterrupted[part], part)
    assert state["global_step"] == 3
    assert all("lora_" in name for name in state["state_dict"])

    parts("export", "checkpoints/last.ckpt", "exported")
    exported = AutoModelForImageTextToText.from_pretrained(tmp_path / "parts/exported").eval()
    policy = load_policy(PolicyOptions("quickstart", lora=LoraOptions(rank=4), quantization="nf4")).eval()
    policy.load_state_dict({n.removeprefix("policy."): w for n, w in state["state_dict"].items()}, strict=False)
    inputs = question(tmp_path / "parts/exported")
    trained = policy.model(**inputs).logits
    torch.testing.assert_close(exported(**inputs).logits, trained, rtol=1e-4, atol=1e-4)
    with policy.adapters_off():
        assert (policy.model(**inputs).logits - trained).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("options", "says"), [({"quantization": "nf4"}, "set policy.lora"), ({"quantization": "int3"}, "use nf4 or fp4")]
)
def test_what_cannot_be_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        PolicyOptions("quickstart", **options)


def test_sharded_strategies_are_refused() -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match="cannot be spread by FSDP2: use ddp"):
        load_models(FSDP2(), QLORA, "32-true", None)
    deepspeed = DeepSpeedStrategy.__new__(DeepSpeedStrategy)  # made, it wants DeepSpeed
    with pytest.raises(ValueError, match="cannot be spread by DeepSpeedStrategy"):
        load_models(deepspeed, QLORA, "32-true", None)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"pip install 'observe-r1\[qlora\]'"):
        load_policy(QLORA)
