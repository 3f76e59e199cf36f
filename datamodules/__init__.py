"""Data modules: where prompts come from."""

from observe_r1.datamodules.neura_ladder import NeuraLadderDataModule
from observe_r1.datamodules.quickstart import QuickstartDataModule

__all__ = ["NeuraLadderDataModule", "QuickstartDataModule"]
