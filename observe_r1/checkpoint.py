"""What observe_r1 adds to a Lightning checkpoint, and what it leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ENTRY = "observe_r1"
REFERENCE = "reference."


def drop_reference(checkpoint: dict[str, Any]) -> None:
    """Takes out the weights of the reference model: they never change and are loaded from their own files."""
    for name in [name for name in checkpoint["state_dict"] if name.startswith(REFERENCE)]:
        del checkpoint["state_dict"][name]


def restore_reference(checkpoint: dict[str, Any], weights: Mapping[str, Any]) -> None:
    """Puts the loaded reference model where a strict load of the state looks for it."""
    checkpoint["state_dict"] |= {f"{REFERENCE}{name}": value for name, value in weights.items()}


def check_entry(checkpoint: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """The project's entry of a checkpoint.

    Raises:
        ValueError: Something else wrote the checkpoint, or it belongs to another model.
    """
    if ENTRY not in checkpoint:
        raise ValueError(f"The checkpoint was not written by observe_r1: it has no {ENTRY!r} entry.")
    saved: dict[str, Any] = checkpoint[ENTRY]
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
