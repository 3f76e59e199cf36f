"""The dry run on the tiny policy: what it reports, that it leaves no trace, and what it says when memory is short."""

from __future__ import annotations

import csv
import random
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from observe_r1.answers import Gold
from observe_r1.callbacks import DryRun, dry_run
from observe_r1.collection import UpdateOptions
from observe_r1.datamodules import NeuraLadderDataModule
from observe_r1.datamodules.neura_ladder import positions_to_inspect
from observe_r1.encoding import PromptOptions
from observe_r1.experience import Prompt
from observe_r1.ladder.shards import write_ladder
from observe_r1.loading import PolicyOptions
from observe_r1.module import ObserveR1
from observe_r1.peak_memory import PeakMemory
from observe_r1.policy import Policy
from observe_r1.quickstart.questions import make_question
from observe_r1.rollout import SamplingOptions

is_measured = pytest.mark.skipif(not PeakMemory.is_measured("cpu"), reason="this machine does not tell the peak")


class Recorder(L.Callback):
    """Keeps the state a training starts from and ends with. Comes after the dry run in the list."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start = self.state(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.end = self.state(trainer, pl_module)

    def state(self, trainer: L.Trainer, module: L.LightningModule) -> list[Any]:
        tensors = [torch.get_rng_state(), torch.from_numpy(np.random.get_state()[1].astype("int64"))]  # type: ignore[index]
        tensors += [value.clone() for value in (*module.parameters(), *module.buffers())]
        tensors += [
            torch.as_tensor(value).clone()
            for optimizer in trainer.optimizers
            for state in optimizer.state.values()
            for value in state.values()
        ]
        modes = [part.training for part in module.modules()]
        gradients = [parameter.grad is None for parameter in module.parameters()]
        return [tensors, random.getstate(), modes, gradients, module.policy.is_checked]


def fit(
    ladder: Path,
    *callbacks: L.Callback,
    freeze: tuple[str, ...] = (),
    micro_batches: int = 1,
    max_steps: int = 2,
    **trainer_options: Any,
) -> ObserveR1:
    """Trains for two steps: rollouts of 4 prompts with 3 completions of up to 12 tokens, dealt to 2 steps."""
    L.seed_everything(0)
    module = ObserveR1(
        PolicyOptions("quickstart", gradient_checkpointing=False, freeze=list(freeze)),
        PromptOptions(system_prompt=None),
        SamplingOptions(group_size=3, max_new_tokens=12),
        updates=UpdateOptions(steps_per_rollout=2),
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        accumulate_grad_batches=micro_batches,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **{"logger": False, **trainer_options},
    )
    trainer.fit(module, datamodule=NeuraLadderDataModule(str(ladder), prompts_per_rollout=4, workers=0))
    return module


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the dry run says in the terminal."""
    said: list[str] = []
    monkeypatch.setattr(dry_run, "rank_zero_info", said.append)
    return said


@is_measured
def test_the_report_and_its_figure(tiny_ladder: Path, tmp_path: Path, lines: list[str]) -> None:
    fit(tiny_ladder, DryRun(), logger=CSVLogger(tmp_path, ""))
    assert len(lines) == 2
    found = re.fullmatch(
        r"Dry run: a micro-batch of 2 prompts of (\d+) tokens with 6 completions of 12 tokens takes ([\d,.]+) ([GM])iB "
        r"at its peak \(the whole process; [\d,.]+ GiB available\), \d+\.\d s\. The optimizer will add 7 MiB\.",
        lines[1],
    )
    assert found is not None, lines[1]
    assert 40 <= int(found[1]) <= 60
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        first = next(csv.DictReader(file))
    logged = float(first["memory/dry_run_peak_gib"])
    assert int(first["step"]) == 0
    assert 0.1 < logged < 16  # a Python process with torch in it
    said = float(found[2].replace(",", "")) / (1 if found[3] == "G" else 1024)
    assert said == pytest.approx(logged, abs=0.06)


@is_measured
def test_longer_completions_take_more_memory(tiny_ladder: Path, tmp_path: Path) -> None:
    peaks = []
    for tokens in (12, 768):
        fit(tiny_ladder, DryRun(completion_tokens=tokens), logger=CSVLogger(tmp_path, str(tokens)), max_steps=1)
        with next((tmp_path / str(tokens)).rglob("metrics.csv")).open() as file:
            peaks.append(float(next(csv.DictReader(file))["memory/dry_run_peak_gib"]))
    # 6 × 768 tokens, each with the float32 activations of 3 layers of 128 values
    assert peaks[1] > peaks[0] + 6 * 768 * 3 * 128 * 4 / 2**30


@pytest.mark.parametrize(
    ("micro_batches", "expected"), [(2, "3 completions of 12 tokens"), (6, "1 completion of 12 tokens")]
)
def test_micro_batches_are_dealt_as_in_training(
    tiny_ladder: Path, lines: list[str], micro_batches: int, expected: str
) -> None:
    fit(tiny_ladder, DryRun(), micro_batches=micro_batches, max_steps=1)
    assert re.search(rf"a micro-batch of 1 prompt of \d+ tokens with {expected}", lines[-1])


@pytest.mark.parametrize("freeze", [(), ("*visual*",)])
def test_a_run_with_it_is_the_run_without_it(tiny_ladder: Path, freeze: tuple[str, ...]) -> None:
    """Bit for bit: weights, buffers, optimizer, random states, modes, gradients and the pending self-check."""
    without, with_it = Recorder(), Recorder()
    fit(tiny_ladder, without, freeze=freeze)
    fit(tiny_ladder, DryRun(), with_it, freeze=freeze)
    for one, other in ((without.start, with_it.start), (without.end, with_it.end)):
        assert len(one[0]) == len(other[0]) > 70
        assert all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))
        assert one[1:] == other[1:]
    assert len(without.end[0]) > len(without.start[0])  # Adam has its moments, so something was trained


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_too_little_memory_is_named_with_sizes_and_remedies(
    tiny_ladder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(Policy, "forward", raising(error))
    with pytest.raises(ValueError, match=r"2 prompts of .* tokens with 6 completions of 12 tokens") as caught:
        fit(tiny_ladder, DryRun())
    assert caught.value.__cause__ is error
    remedies = (
        *("accumulate_grad_batches (now 1)", "gradient_checkpointing: true (now false)", "max_new_tokens (now 12)"),
        *("model.prompt.max_pixels", "model.policy.freeze: ['*visual*']", "DryRun(completion_tokens=…)"),
    )
    places = [str(caught.value).index(remedy) for remedy in remedies]
    assert places == sorted(places)


@is_measured
def test_too_little_memory_for_the_optimizer_is_a_warning(tiny_ladder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PeakMemory, "available", 64 * 2**20)
    with pytest.warns(UserWarning, match=r"Training needs about .* more than the 64 MiB there are\. What helps"):
        fit(tiny_ladder, DryRun(), max_steps=1)


def test_an_optimizer_that_is_not_adam_or_has_its_state_adds_nothing() -> None:
    weights = [torch.zeros(1000, dtype=torch.bfloat16, requires_grad=True)]
    assert dry_run._moments(torch.optim.SGD(weights)) == 0
    adam = torch.optim.AdamW(weights)
    assert dry_run._moments(adam) == 2 * 1000 * 2
    weights[0].grad = torch.zeros_like(weights[0])
    adam.step()
    assert dry_run._moments(adam) == 0


def test_where_memory_cannot_be_measured_it_runs_without_the_figure(
    tiny_ladder: Path, tmp_path: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PeakMemory, "is_measured", lambda device: False)
    fit(tiny_ladder, DryRun(), logger=CSVLogger(tmp_path, ""), max_steps=1)
    assert re.search(r"of 12 tokens takes \d+\.\d s\. The optimizer", lines[-1])
    assert all("dry_run" not in path.read_text() for path in tmp_path.rglob("metrics.csv"))


def test_a_model_that_cannot_share_prompts_is_left_to_the_self_check(
    tiny_ladder: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Policy, "_packed", raising(ValueError("sliding window")))
    with pytest.warns(UserWarning, match="Training goes on with the padded forward"):
        fit(tiny_ladder, DryRun(), max_steps=1)
    assert lines[-1] == "Dry run left out: the forward raised ValueError: sliding window"


def test_left_out_where_the_engine_runs_the_backward_or_nobody_knows_the_prompts(lines: list[str]) -> None:
    module = ObserveR1(PolicyOptions("quickstart"))
    for accumulates, datamodule in ((True, None), (False, L.LightningDataModule())):
        strategy = SimpleNamespace(handles_gradient_accumulation=accumulates)
        DryRun().on_train_start(SimpleNamespace(strategy=strategy, datamodule=datamodule), module)  # type: ignore[arg-type]
    assert lines[0].endswith("runs the backward in its own engine.")
    assert lines[1].endswith("LightningDataModule has no `largest_prompt`.")


def test_a_ladder_of_bad_samples_gets_its_own_error(tmp_path: Path, lines: list[str]) -> None:
    write_ladder([make_question("train", 5, index).prompt() for index in range(3)], tmp_path)
    (shard,) = tmp_path.glob("*.tar")
    shard.write_bytes(shard.read_bytes().replace(b"IHDR", b"XXXX"))
    with pytest.raises(ValueError, match="No sample of the ladder can be used"):
        fit(tmp_path, DryRun())
    assert lines[-1] == "Dry run left out: none of these samples can be used."


@pytest.mark.parametrize("options", [{"inspected": 0}, {"completion_tokens": 0}])
def test_settings_are_checked(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"\(0\)"):
        DryRun(**options)


def test_the_largest_prompt_of_a_ladder(tmp_path: Path) -> None:
    """One picture takes more bytes, another one more tokens, and one question is too long to be trained on."""

    def prompt(number: int, size: int = 56, words: int = 4) -> Prompt:
        text = {"type": "text", "text": "How many " * words}
        messages = [{"role": "user", "content": [{"type": "image", "index": 0}, text]}]
        return Prompt(str(number), "", messages, [Image.new("RGB", (size, size), "white")], Gold("3"))

    noisy = prompt(1)
    noisy.images[0].putdata([tuple(int(v) for v in np.random.default_rng(n).integers(0, 256, 3)) for n in range(56**2)])
    samples = [prompt(0), noisy, prompt(2, size=168), prompt(3), prompt(4, words=2000)]
    write_ladder(samples, tmp_path)
    data = NeuraLadderDataModule(str(tmp_path), prompts_per_rollout=4, workers=0)
    module = ObserveR1(PolicyOptions("quickstart"), PromptOptions(None, 1000, 28**2, 224**2))
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(module)
    module.trainer = data.trainer = trainer
    module.configure_model()
    largest = data.largest_prompt(64)
    assert largest is not None
    assert largest.prompt.id == "2"
    assert data.skipped() == {"train": {}, "held_out": {}}


def test_inspected_samples_are_the_largest_and_some_of_everywhere() -> None:
    assert positions_to_inspect(np.array([5, 5, 9, 5, 0, 5, 5, 5]), 4) == [2, 0, 3, 6]
    assert positions_to_inspect(np.array([1, 0, 2]), 64) == [2, 0]
    assert positions_to_inspect(np.array([0, 0]), 8) == []
    sizes = [n % 97 for n in range(1000)]
    chosen = positions_to_inspect(np.array(sizes), 64)
    assert len(set(chosen)) == 64
    assert min(sizes[position] for position in chosen[:16]) >= 95
    gaps = np.diff(chosen[16:])
    assert gaps.min() >= 15
    assert gaps.max() <= 30


def raising(error: Exception) -> Callable[..., Any]:
    def forward(*_: Any, **__: Any) -> Any:
        raise error

    return forward
