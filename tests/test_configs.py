"""Every shipped YAML goes through the real command line; the paper's configs carry the paper's numbers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from observe_r1.checkpoint_io import AsyncCheckpoints
from observe_r1.datamodules import NeuraLadderDataModule
from observe_r1.module import ObserveR1

CONFIGS = Path(__file__).parent.parent / "configs"
EXPERIMENTS = sorted(path.name for path in CONFIGS.glob("*.yaml"))
ABLATIONS = sorted(path.name for path in (CONFIGS / "ablations").glob("*.yaml"))
LOGGERS = {
    "csv.yaml": ["CSVLogger"],
    "mlflow.yaml": ["TensorBoardLogger", "MLFlowLogger"],
    "tensorboard.yaml": ["TensorBoardLogger"],
    "wandb.yaml": ["TensorBoardLogger", "WandbLogger"],
}
STRATEGIES = sorted(path.name for path in (CONFIGS / "strategies").glob("*.yaml"))

# What stands in for the GPUs and the billions of parameters.
STAND_IN = (
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.strategy=auto",
    "--trainer.precision=32-true",
    "--model.policy.pretrained=quickstart",
)


def instantiate(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> LightningCLI:
    """The objects of `observe-r1 fit`, made by its own parser, without running them."""
    monkeypatch.setattr(sys, "argv", ["observe-r1", *arguments])
    return LightningCLI(ObserveR1, NeuraLadderDataModule, subclass_mode_data=True, run=False, save_config_callback=None)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_instantiate(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    cli = instantiate(monkeypatch, f"--config={CONFIGS / name}", *STAND_IN)
    assert isinstance(cli.model, ObserveR1)
    assert isinstance(cli.datamodule, NeuraLadderDataModule)


@pytest.mark.parametrize("experiment", ["quickstart.yaml", "observe_r1_7b.yaml"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_combine_with_experiments(monkeypatch: pytest.MonkeyPatch, name: str, experiment: str) -> None:
    """Parsed, not instantiated: most of them need GPUs."""
    quickstart = instantiate(monkeypatch, f"--config={CONFIGS / 'quickstart.yaml'}", *STAND_IN)
    config = quickstart.parser.parse_args(
        [f"--config={CONFIGS / experiment}", f"--config={CONFIGS / 'strategies' / name}"]
    )
    assert config.trainer.strategy is not None
    expected = {"ddp.yaml": "DDPStrategy", "fsdp.yaml": "FSDP2", "fsdp2.yaml": "FSDP2"}.get(name, "DeepSpeed")
    assert expected in str(config.trainer.strategy)


@pytest.mark.parametrize("name", sorted(path.name for path in (CONFIGS / "loggers").glob("*.yaml")))
def test_loggers_combine_with_experiments(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Parsed, not instantiated: that makes directories and data bases."""
    quickstart = instantiate(monkeypatch, f"--config={CONFIGS / 'quickstart.yaml'}", *STAND_IN)
    for experiment in ("quickstart.yaml", "observe_r1_7b.yaml"):
        config = quickstart.parser.parse_args(
            [f"--config={CONFIGS / experiment}", f"--config={CONFIGS / 'loggers' / name}"]
        )
        chosen = config.trainer.logger
        loggers = chosen if isinstance(chosen, list) else [chosen]
        assert [logger.class_path.rpartition(".")[2] for logger in loggers] == LOGGERS[name]
        assert all(logger.init_args.save_dir == "runs" for logger in loggers if "save_dir" in logger.init_args)


@pytest.mark.parametrize("name", ["checkpoints/async.yaml", "policy/lora.yaml", "policy/qlora.yaml"])
def test_other_overlays_combine_with_experiments(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    overlay = f"--config={CONFIGS / name}"
    cli = instantiate(monkeypatch, f"--config={CONFIGS / 'observe_r1_7b.yaml'}", overlay, *STAND_IN)
    assert isinstance(cli.trainer.strategy.checkpoint_io, AsyncCheckpoints) == name.startswith("checkpoints")
    assert (cli.model.policy_options.lora is not None) == name.startswith("policy")
    assert (cli.model.policy_options.quantization == "nf4") == name.endswith("qlora.yaml")


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_change_only_what_they_say(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    base = instantiate(monkeypatch, f"--config={CONFIGS / 'quickstart.yaml'}", *STAND_IN)
    ablated = instantiate(
        monkeypatch, f"--config={CONFIGS / 'quickstart.yaml'}", f"--config={CONFIGS / 'ablations' / name}", *STAND_IN
    )
    changed = {
        "bonus": base.model.advantage.bonus != ablated.model.advantage.bonus,
        "weight": base.model.advantage.dynamic_weight != ablated.model.advantage.dynamic_weight,
        "order": base.datamodule.order != ablated.datamodule.order,
    }
    expected: dict[str, set[str]] = {
        "plain_grpo.yaml": {"bonus", "weight", "order"},
        "no_bonus.yaml": {"bonus"},
        "no_dynamic_weight.yaml": {"weight"},
        "random_order.yaml": {"order"},
    }
    assert {what for what, is_changed in changed.items() if is_changed} == expected[name]
    same = ("sampling", "objective", "kl", "updates", "filtering", "prompt_options", "policy_options")
    for option in same:
        assert getattr(base.model, option) == getattr(ablated.model, option)


@pytest.mark.parametrize("name", ["observe_r1_3b.yaml", "observe_r1_7b.yaml", "grpo_3b.yaml"])
def test_paper_values(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The constants of the release, written down a second time from the sources."""
    document: dict[str, Any] = yaml.safe_load((CONFIGS / name).read_text())
    cli = instantiate(monkeypatch, f"--config={CONFIGS / name}", *STAND_IN)
    model, data = cli.model, cli.datamodule
    size = "7B" if "7b" in name else "3B"
    assert document["model"]["policy"]["pretrained"] == f"Qwen/Qwen2.5-VL-{size}-Instruct"
    assert document["trainer"]["precision"].startswith("bf16")
    assert document["trainer"]["gradient_clip_val"] == 1.0
    assert (model.sampling.group_size, model.sampling.temperature, model.sampling.top_p) == (8, 1.0, 1.0)
    assert (model.sampling.max_new_tokens, model.prompt_options.max_prompt_tokens) == (8192, 9216)
    assert (model.prompt_options.min_pixels, model.prompt_options.max_pixels) == (3136, 2_560_000)
    assert data.prompts_per_rollout * model.sampling.group_size / model.updates.steps_per_rollout == 64
    assert (data.prompts_per_rollout, model.updates.epochs_per_rollout, cli.trainer.max_epochs) == (128, 1, 1)
    assert (model.objective.epsilon_low, model.objective.epsilon_high) == (0.2, 0.2)
    assert {reward.name: reward.weight for reward in model.rewards.rewards} == {"format": 0.5, "accuracy": 1.0}
    assert model.kl.coefficient == 0.01
    if name == "grpo_3b.yaml":
        assert (model.advantage.bonus, model.advantage.dynamic_weight, data.order) == (0.0, None, "random")
        assert (model.objective.name, model.kl.placement, model.kl.estimator) == ("grpo", "loss", "k3")
    else:
        assert (model.advantage.bonus, model.advantage.bonus_above_tokens) == (0.2, 100)
        assert (model.advantage.dynamic_weight, data.order) == (1.8, "ladder")
        assert (model.objective.name, model.kl.placement, model.kl.estimator) == ("dapo", "reward", "k1")


@pytest.mark.parametrize("name", ["observe_r1_3b.yaml", "observe_r1_7b.yaml", "grpo_3b.yaml"])
def test_paper_schedule(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """3 % warm-up to 1e-6, then a cosine to a tenth of it."""
    import torch

    cli = instantiate(monkeypatch, f"--config={CONFIGS / name}", *STAND_IN)
    optimizer = cli.model.optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (tuple(optimizer.defaults["betas"]), optimizer.defaults["weight_decay"]) == ((0.9, 0.95), 0.0)
    schedule = cli.model.scheduler(optimizer, 1000)
    rates = []
    for _ in range(1001):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert max(rates) == rates[29] == pytest.approx(1e-6)
    assert rates[0] == pytest.approx(1e-6 / 30)
    assert rates[515] == pytest.approx((1e-6 + 1e-7) / 2, rel=1e-2)
    assert rates[1000] == pytest.approx(1e-7)


def test_the_quick_start_with_vllm_differs_in_the_sampler_only() -> None:
    plain, vllm = (yaml.safe_load((CONFIGS / name).read_text()) for name in ("quickstart.yaml", "quickstart_vllm.yaml"))
    assert vllm["model"].pop("rollout")["class_path"] == "observe_r1.rollout.VLLMLocalRollout"
    assert vllm["trainer"]["callbacks"].pop(0)["class_path"] == "observe_r1.callbacks.VLLMWeightSync"
    vllm["trainer"]["logger"]["init_args"]["name"] = "quickstart"
    assert vllm == plain
