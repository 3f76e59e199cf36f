"""What the weight sync refuses; its work is tested with vLLM in tests/vllm."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.cli import LightningCLI

from observe_r1.callbacks import RewardLogger, VLLMWeightSync
from observe_r1.cli import locate_config
from observe_r1.datamodules import NeuraLadderDataModule
from observe_r1.loading import PolicyOptions
from observe_r1.module import ObserveR1
from observe_r1.rollout import HFRollout, RolloutEngine, VLLMLocalRollout, VLLMServerRollout


@pytest.mark.parametrize("options", [{"parity_every": 0}, {"warn_above": -1.0}, {"warn_above": 0.3}])
def test_settings_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="VLLMWeightSync: "):
        VLLMWeightSync(**options)


def test_an_engine_that_is_the_trainer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"HFRollout samples with the trained model .* observe_r1\.rollout\.VLLM"):
        VLLMWeightSync().setup(None, ObserveR1(PolicyOptions("quickstart")), "fit")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("overlay", "engine"), [("vllm_local", VLLMLocalRollout), ("vllm_server", VLLMServerRollout), ("hf", HFRollout)]
)
def test_the_overlays_go_behind_an_experiment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, overlay: str, engine: type[RolloutEngine]
) -> None:
    """Found in the package from anywhere; the experiment keeps its own callbacks."""
    monkeypatch.chdir(tmp_path)
    configs = [locate_config(f"--config={name}") for name in ("quickstart.yaml", f"rollout/{overlay}.yaml")]
    assert all(Path(config.removeprefix("--config=")).is_file() for config in configs)
    monkeypatch.setattr(sys, "argv", ["observe-r1", *configs, "--trainer.accelerator=cpu"])
    cli = LightningCLI(ObserveR1, NeuraLadderDataModule, subclass_mode_data=True, run=False, save_config_callback=None)
    assert isinstance(cli.model.engine, engine)
    kinds = [type(callback) for callback in cli.trainer.callbacks]  # type: ignore[attr-defined]
    assert (VLLMWeightSync in kinds) == (overlay != "hf")
    assert RewardLogger in kinds
