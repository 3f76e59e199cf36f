"""Learning-rate schedules that know how long the run is."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class WarmupCosine(LambdaLR):
    """Linear warm-up, then a cosine down to a fraction of the learning rate; the shape of the release.

    Args:
        optimizer: Whose learning rate is scheduled.
        total_steps: Optimizer steps of the run; the module fills it in from the trainer.
        warmup_fraction: Share of the steps that warms up.
        final_fraction: Learning rate at the end, as a share of the highest.
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int, warmup_fraction: float = 0.03, final_fraction: float = 0.1
    ) -> None:
        if not 0 <= warmup_fraction < 1 or not 0 <= final_fraction <= 1:
            raise ValueError(
                f"WarmupCosine: warmup_fraction is {warmup_fraction} (valid: 0 up to 1) and final_fraction "
                f"{final_fraction} (valid: 0 to 1)."
            )
        warmup = math.ceil(total_steps * warmup_fraction)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
            return final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))

        super().__init__(optimizer, factor)
