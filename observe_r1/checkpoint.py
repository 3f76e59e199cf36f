"""What observe_r1 adds to a Lightning checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from observe_r1.atomic_files import intact

if TYPE_CHECKING:
    from observe_r1.policy import Policy

ENTRY = "observe_r1"
EXPECTED = {"fingerprint", "rng", "policy", "prompt", "rollout_figures", "seconds", "verdicts"}
POLICY = "policy."  # attribute of the LightningModule
FSDP2_METADATA = "meta.pt"  # Lightning's names, in the directories that ranks write parts of
DEEPSPEED_TAG = "checkpoint"


def drop_frozen(checkpoint: dict[str, Any], policy: Policy) -> None:
    """Takes out the weights below adapters: they never change and are loaded from their own files."""
    frozen = {f"{POLICY}{name}" for name in unsaved(policy)}
    for name in frozen & checkpoint.get("state_dict", {}).keys():
        del checkpoint["state_dict"][name]


def restore_frozen(checkpoint: dict[str, Any], policy: Policy) -> None:
    """Puts the loaded weights where a strict load of the state looks for them."""
    if "state_dict" in checkpoint:  # sharded strategies keep the weights elsewhere
        weights = policy.state_dict()
        # what belongs to quantised weights comes with them, and is no parameter that a load looks for
        names = unsaved(policy) & {name for name, _ in policy.named_parameters(remove_duplicate=False)}
        for name in names:
            checkpoint["state_dict"].setdefault(f"{POLICY}{name}", weights[name])


def unsaved(policy: Policy) -> set[str]:
    """Names of the state below adapters: frozen weights, and the scales of those in 4 bits."""
    if not policy.has_adapters:
        return set()
    named = policy.named_parameters(remove_duplicate=False)
    frozen = {name for name, parameter in named if not parameter.requires_grad}
    return {name for name in policy.state_dict() if not frozen.isdisjoint(_and_parents(name))}


def _and_parents(name: str) -> list[str]:
    """`a.b`: `a` and `a.b`."""
    return list(accumulate(name.split("."), "{}.{}".format))


LIGHTNINGS_OWN = ("", "last", "best", "hpc", "null")  # values of --ckpt_path that are no files


def check_requested(arguments: Sequence[str]) -> None:
    """Looks at the checkpoint that a command line asks for, before a run is set up for it.

    Raises:
        ValueError: There is no such file, or observe_r1 did not write it.
    """
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        option, equals, value = argument.partition("=")
        path = value if equals else following
        if option == "--ckpt_path" and path not in LIGHTNINGS_OWN and "://" not in path:
            check_file(path)


def check_file(path: str) -> None:
    """Looks into a checkpoint.

    Raises:
        ValueError: There is no such file, or observe_r1 did not write it.
    """
    import torch

    found = intact(path)
    if not found.exists():
        raise ValueError(
            f"ckpt_path: no file {path!r}. Checkpoints lie in RUN_DIRECTORY/checkpoints, such as last.ckpt."
        )
    if found.is_dir():
        _check_directory(found)
        return
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        is_ours = ENTRY in content
    except Exception as error:  # whatever a file that is something else makes the unpickler raise
        raise ValueError(f"ckpt_path: {path!r} is not a checkpoint that can be loaded safely ({error}).") from error
    if not is_ours:
        raise ValueError(f"ckpt_path: {path!r} was not written by observe_r1: it has no {ENTRY!r} entry.")


def _check_directory(path: Path) -> None:
    """Sharded checkpoints are directories, which Lightning reads; so is where runs keep their checkpoints."""
    if (path / FSDP2_METADATA).is_file() or (path / DEEPSPEED_TAG).is_dir():
        return
    inside = sorted(entry.name for entry in path.glob("*.ckpt"))
    there = f"it holds {', '.join(inside)}: name one of them" if inside else "it holds none"
    raise ValueError(f"ckpt_path: {str(path)!r} is a directory and no checkpoint; {there}.")


def check_entry(checkpoint: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """The project's entry of a checkpoint.

    Raises:
        ValueError: Something else wrote the checkpoint, or it belongs to another model.
    """
    if ENTRY not in checkpoint:
        raise ValueError(f"The checkpoint was not written by observe_r1: it has no {ENTRY!r} entry.")
    saved: dict[str, Any] = checkpoint[ENTRY]
    lacking = EXPECTED - saved.keys() or ({"rng of every rank"} if not isinstance(saved["rng"], list) else set())
    if lacking:
        raise ValueError(
            f"The checkpoint is of another version of observe_r1 (it lacks {', '.join(sorted(lacking))}), which cannot "
            "be resumed: resume with that version, or export its weights (observe-r1 export … --dtype "
            "float32) and train on from them (model.policy.pretrained)."
        )
    different = "; ".join(
        f"{name}: {saved['fingerprint'].get(name)} in the checkpoint, {value} in the model"
        for name, value in fingerprint.items()
        if saved["fingerprint"].get(name) != value
    )
    if different:
        raise ValueError(
            f"The checkpoint belongs to another model ({different}). Set model.policy to the one it was trained from, "
            "or start without ckpt_path."
        )
    return saved
