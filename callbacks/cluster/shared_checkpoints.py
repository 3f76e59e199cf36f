"""Makes sure that the parts of a checkpoint come together, before anything is trained."""

from __future__ import annotations

import time
import uuid
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy

from observe_r1.ranks import any_rank, over_ranks
from observe_r1.strategies import FSDP2


class SharedCheckpoints(L.Callback):
    """On several nodes, strategies whose ranks write parts of a checkpoint need a directory that all nodes share.

    Otherwise the parts of other nodes would be missing, and nobody would notice before a resume. Part of every run of
    the command line.
    """

    patience = 60.0  # seconds; what a network file system knows of a directory may be that old
    resumed: str | None = None  # the checkpoint that this rank is to load; the trainer says it only when that is done

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        found = set(over_ranks(str(self.resumed)))
        if len(found) > 1:
            raise ValueError(
                f"ckpt_path is not the same for all ranks: {', '.join(sorted(found))}. Keep checkpoints on a disk that "
                "all nodes share, or name the file."
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        strategy = trainer.strategy
        writes_parts = isinstance(strategy, DeepSpeedStrategy) or (
            isinstance(strategy, FSDP2) and strategy._save_distributed_checkpoint
        )
        if trainer.num_nodes == 1 or not writes_parts:
            return
        directories = {str(c.dirpath) for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)}
        for directory in (directory for directory in directories if "://" not in directory):
            marker = Path(directory) / strategy.broadcast(f".shared-{uuid.uuid4().hex}")
            if trainer.is_global_zero:
                marker.parent.mkdir(parents=True, exist_ok=True)
                marker.touch()
            strategy.barrier()
            is_missing = any_rank(not self.appears(marker), pl_module.device)
            if trainer.is_global_zero:
                marker.unlink()
            if is_missing:
                raise ValueError(
                    f"Some node does not see the checkpoints of the first one in {directory}, and with "
                    f"{type(strategy).__name__} every rank writes a part of them. Set the dirpath of ModelCheckpoint, "
                    "or the save_dir of the logger, to a directory that all nodes share."
                )

    def appears(self, marker: Path) -> bool:
        until = time.monotonic() + self.patience
        while not marker.exists():
            if time.monotonic() > until:
                return False
            time.sleep(0.5)
        return True
