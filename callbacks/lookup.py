"""How a callback finds another one that it reads from."""

from __future__ import annotations

from typing import TypeVar

import lightning as L

Kind = TypeVar("Kind", bound=L.Callback)


def first_of(trainer: L.Trainer, kind: type[Kind]) -> Kind | None:
    """The first callback of this kind; None where there is none."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)
