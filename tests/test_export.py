"""Exported checkpoints, as transformers itself loads them."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from observe_r1.checkpoint import ENTRY, POLICY
from observe_r1.encoding import PromptOptions
from observe_r1.export import Dtype, export_checkpoint
from observe_r1.loading import LoraOptions, PolicyOptions, load_policy, load_processor
from observe_r1.quickstart.questions import make_question

TRAINING = (
    "fit",
    "--config=quickstart.yaml",
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=2",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.limit_val_batches=0",
    "--trainer.val_check_interval=null",
    "--trainer.enable_progress_bar=false",
    "--trainer.logger=false",
    "--trainer.callbacks=lightning.pytorch.callbacks.ModelCheckpoint",
    "--trainer.callbacks.dirpath=checkpoints",
    "--trainer.callbacks.save_last=true",
    "--trainer.callbacks.every_n_train_steps=1",
    "--trainer.callbacks.save_top_k=0",
    "--model.policy.lora={rank: 4}",
    "--model.optimizer.lr=0.02",  # two steps have to show
    "--model.scheduler=null",
    "--model.sampling.group_size=4",
    "--model.sampling.max_new_tokens=12",
    "--data.class_path=observe_r1.datamodules.NeuraLadderDataModule",
    "--data.prompts_per_rollout=6",
    "--data.workers=0",
)


@pytest.mark.parametrize(
    ("dtype", "expected"), [("auto", torch.bfloat16), ("float32", torch.float32), ("float16", torch.float16)]
)
def test_the_dtype_is_that_of_the_first_model_unless_asked_for(
    dtype: Dtype, expected: torch.dtype, tmp_path: Path
) -> None:
    """A run in float32 that started from a model in bfloat16, as those of the hub are."""
    start, checkpoint, output = tmp_path / "start", tmp_path / "last.ckpt", tmp_path / "output"
    load_policy(PolicyOptions("quickstart"), torch.bfloat16).save_pretrained(start)
    load_processor("quickstart", PromptOptions()).save_pretrained(start)
    options = PolicyOptions(str(start))
    policy = load_policy(options)
    assert policy.model.dtype == torch.float32
    entry = {"policy": dataclasses.asdict(options), "prompt": dataclasses.asdict(PromptOptions())}
    weights = {f"{POLICY}{name}": weight for name, weight in policy.state_dict().items()}
    torch.save({"state_dict": weights, ENTRY: entry}, checkpoint)
    export_checkpoint(str(checkpoint), str(output), dtype=dtype)
    assert {weight.dtype for weight in load_file(output / "model.safetensors").values()} == {expected}
    assert AutoConfig.from_pretrained(output).dtype == expected


@pytest.mark.slow
@torch.no_grad()
def test_merged_adapters_give_the_logits_of_the_trained_policy(
    tmp_path: Path, tiny_ladder: Path, command_line: Any
) -> None:
    pytest.importorskip("peft")
    run = command_line(tmp_path)
    run(*TRAINING, f"--data.ladder={tiny_ladder}")
    run("export", "checkpoints/last.ckpt", "exported")
    # in double precision what is left is the rounding of the merged weights
    exported = AutoModelForImageTextToText.from_pretrained(tmp_path / "exported").eval().double()

    policy = load_policy(PolicyOptions("quickstart", lora=LoraOptions(rank=4))).eval().double()
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    adapters = {name.removeprefix("policy."): weight for name, weight in saved.items()}
    assert all("lora_" in name for name in adapters)
    assert not policy.load_state_dict(adapters, strict=False).unexpected_keys

    prompt = make_question("held_out", seed=5, index=0).prompt()
    processor = AutoProcessor.from_pretrained(tmp_path / "exported")
    parts = [*({"type": "image"} for _ in prompt.images), {"type": "text", "text": "How many shapes are red?"}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    inputs = processor(text=[text], images=list(prompt.images), return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"].double()
    trained = policy.model(**inputs).logits
    torch.testing.assert_close(exported(**inputs).logits, trained, atol=1e-5, rtol=1e-5)
    with policy.adapters_off():
        assert (policy.model(**inputs).logits - trained).abs().max() > 1e-2


@pytest.mark.slow
def test_exports_of_runs_are_replaced_and_nothing_else(tmp_path: Path, tiny_ladder: Path, commands: Any) -> None:
    exporting = ("--trainer.callbacks+=observe_r1.callbacks.HFExport", "--trainer.callbacks.directory=models")
    fit = shlex.join(["observe-r1", *TRAINING, f"--data.ladder={tiny_ladder}", *exporting, "--trainer.max_steps"])
    code, output = commands(tmp_path, f"{fit} 1 && {fit} 2 --ckpt_path checkpoints/last.ckpt")
    assert code == 0, output
    assert json.loads((tmp_path / "models/observe_r1.json").read_text())["optimizer_steps"] == 2
    (tmp_path / "models/observe_r1.json").unlink()
    code, output = commands(tmp_path, f"{fit} 1")
    assert code == 1
    assert "HFExport.directory is 'models', which holds what no HFExport has written" in output
    assert (tmp_path / "models/model.safetensors").exists()
