"""`observe-r1 export`: the policy of any checkpoint as a Hugging Face directory."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from observe_r1.atomic_files import intact
from observe_r1.checkpoint import DEEPSPEED_TAG, ENTRY, FSDP2_METADATA, POLICY, check_file, unsaved
from observe_r1.encoding import PromptOptions
from observe_r1.loading import LoraOptions, PolicyOptions, load_policy, load_processor, locate
from observe_r1.policy import Policy
from observe_r1.quantization import unpack_to

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def export_checkpoint(checkpoint: str, output: str, pretrained: str | None = None, dtype: Dtype = "auto") -> None:
    """Write the policy of a checkpoint as `from_pretrained` loads it, with processor and generation config.

    Reads a file, an FSDP2 directory or a DeepSpeed directory; adapters are merged. No GPU is needed. DeepSpeed's
    files are pickles, which can run code when they are read: export only those that you trust.

    Args:
        checkpoint: File or directory that a run has saved.
        output: Directory that is made.
        pretrained: Where the model lies that the run started from; by default where it was then.
        dtype: Of the weights; `auto`: that of the model the run started from.

    Raises:
        ValueError: observe_r1 did not write the checkpoint, or the output is there already.
    """
    source, target = intact(checkpoint), Path(output)
    if target.exists():
        raise ValueError(f"{output!r} exists: name a new directory, or remove it.")
    check_file(checkpoint)
    entry = read_entry(source)
    options = _policy_options(entry["policy"], pretrained)
    policy = load_policy(options)
    _fill(policy, source)
    wanted = _stored_dtype(options) if dtype == "auto" else getattr(torch, dtype)
    policy.to(wanted)
    unpack_to(policy, wanted)
    partial = target.with_name(target.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    policy.save_pretrained(partial)
    load_processor(options.pretrained, PromptOptions(**entry["prompt"])).save_pretrained(partial)
    partial.rename(target)
    Console(stderr=True).print(f"Wrote {output}, for transformers' from_pretrained and vLLM.", soft_wrap=True)


def read_entry(path: Path) -> Mapping[str, Any]:
    """The project's entry of a checkpoint of any kind."""
    states = sorted((path / DEEPSPEED_TAG).glob("*_model_states.pt"))
    if path.is_file():
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    elif (path / FSDP2_METADATA).is_file():
        content = torch.load(path / FSDP2_METADATA, map_location="cpu", weights_only=True)
    elif states:
        content = torch.load(states[0], map_location="cpu", weights_only=False)
    else:
        raise ValueError(f"{str(path)!r} is neither an FSDP2 nor a DeepSpeed checkpoint: it has no {FSDP2_METADATA}.")
    if ENTRY not in content:
        raise ValueError(f"{str(path)!r} was not written by observe_r1: it has no {ENTRY!r} entry.")
    entry: Mapping[str, Any] = content[ENTRY]
    if "policy" not in entry:
        raise ValueError(f"{str(path)!r} is of an older version, which did not save the options of the policy.")
    return entry


def _policy_options(saved: Mapping[str, Any], pretrained: str | None) -> PolicyOptions:
    lora = None if saved["lora"] is None else LoraOptions(**saved["lora"])
    changes = {"pretrained": pretrained or saved["pretrained"], "lora": lora, "gradient_checkpointing": False}
    return PolicyOptions(**{**saved, **changes})


def _stored_dtype(options: PolicyOptions) -> torch.dtype:
    """In which the model lies on disk: once loaded, its config has the dtype that it was loaded in."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(locate(options.pretrained))
    return config.dtype or config.get_text_config().dtype or torch.float32


def _fill(policy: Policy, path: Path) -> None:
    """Puts the weights of a checkpoint into the model that it started from."""
    own = policy.state_dict()
    if path.is_file():
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    elif (path / FSDP2_METADATA).is_file():
        from torch.distributed.checkpoint.state_dict_loader import load

        saved = {POLICY + name: weight for name, weight in own.items()}
        load({"state_dict": saved}, checkpoint_id=path, no_dist=True)
    else:
        try:
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
        except ImportError as error:
            raise ValueError("This checkpoint needs DeepSpeed: pip install 'observe-r1[deepspeed]'.") from error
        saved = get_fp32_state_dict_from_zero_checkpoint(str(path), tag=DEEPSPEED_TAG)
    weights: dict[str, Tensor] = {
        name.removeprefix(POLICY): weight for name, weight in saved.items() if name.startswith(POLICY)
    }
    named = list(policy.named_parameters(remove_duplicate=False))
    found = {id(parameter) for name, parameter in named if name in weights}
    tied = {name for name, parameter in named if id(parameter) in found}
    missing, unknown = own.keys() - weights.keys() - unsaved(policy) - tied, weights.keys() - own.keys()
    if missing or unknown:
        raise ValueError(
            f"The checkpoint {str(path)!r} does not fit the model {policy.transformer.config.name_or_path!r}: "
            f"{sorted(missing)[:3]} are missing, {sorted(unknown)[:3]} are unknown."
        )
    policy.load_state_dict(weights, strict=False)
