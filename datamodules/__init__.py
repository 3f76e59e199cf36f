"""Data modules: where prompts come from."""

from observe_r1.datamodules.neura_ladder import NeuraLadderDataModule

__all__ = ["NeuraLadderDataModule"]
