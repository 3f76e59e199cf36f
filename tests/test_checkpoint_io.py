"""Checkpoints that are written whole, and those that are written while the training goes on."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, StrategyRegistry

from observe_r1.atomic_files import intact, replaced_directory
from observe_r1.checkpoint_io import AsyncCheckpoints, AtomicFiles, snapshot
from observe_r1.strategies import FSDP2, DeepSpeed, prepare

from .test_export import TRAINING
from .test_resume import assert_equal, final_state


class Held(AtomicFiles):
    """Writes when it is let."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def save_checkpoint(self, *arguments: Any) -> None:
        assert self.go.wait(60)
        super().save_checkpoint(*arguments)


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step(model, optimizer)
    return model, optimizer


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()


def test_what_is_written_later_is_as_it_was(tmp_path: Path) -> None:
    """The next optimizer step changes weights and moments in place, and containers change too."""
    model, optimizer = trained()
    checkpoint = {
        "state_dict": model.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "drawn": [1, {"n": 2}],
    }
    expected = copy.deepcopy(checkpoint)
    io = AsyncCheckpoints()
    io.files = held = Held()
    io.save_checkpoint(checkpoint, tmp_path / "last.ckpt")
    step(model, optimizer)
    checkpoint["drawn"][1]["n"] = 3
    checkpoint["drawn"].append(4)
    assert not torch.equal(checkpoint["state_dict"]["0.weight"], expected["state_dict"]["0.weight"])
    held.go.set()
    io.teardown()
    assert_equal(torch.load(tmp_path / "last.ckpt", weights_only=True), expected)


def test_snapshots_share_what_was_shared() -> None:
    """Tied weights once, and everything else apart from what it is a copy of."""
    model, _ = trained()
    taken = snapshot({"a": OrderedDict(model.state_dict()), "b": (torch.ones(2), None)})
    assert taken["a"]["0.weight"].data_ptr() == taken["a"]["1.weight"].data_ptr() != model[0].weight.data_ptr()
    assert taken["a"]["0.bias"].data_ptr() != taken["a"]["1.bias"].data_ptr()


def test_a_copy_more_than_allowed_waits(tmp_path: Path) -> None:
    io = AsyncCheckpoints(snapshots=1)
    io.files = held = Held()
    io.save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
    second = threading.Thread(target=io.save_checkpoint, args=({"step": 2}, tmp_path / "last.ckpt"))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    held.go.set()
    second.join(60)
    io.teardown()
    assert torch.load(tmp_path / "last.ckpt") == {"step": 2}


def test_errors_come_and_nothing_is_removed_after_them(tmp_path: Path) -> None:
    io = AsyncCheckpoints()
    io.save_checkpoint({"step": 1}, tmp_path / "good.ckpt")
    (tmp_path / "file").touch()
    bad = tmp_path / "file" / "bad.ckpt"
    io.save_checkpoint({"step": 2}, bad)
    io.remove_checkpoint(tmp_path / "good.ckpt")
    with pytest.raises(OSError, match=f"'{bad}' could not be written: .*File exists.*--ckpt_path last"):
        io.teardown()
    assert torch.load(tmp_path / "good.ckpt") == {"step": 1}

    io = AsyncCheckpoints(snapshots=1)
    io.save_checkpoint({"step": 2}, bad)
    with pytest.raises(OSError, match="could not be written"):
        io.save_checkpoint({"step": 3}, tmp_path / "later.ckpt")
    io.teardown()  # was raised already


def test_a_full_device_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of the system, not that of the serialiser which stumbles over it."""
    AtomicFiles().save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
    partial = tmp_path / "last.ckpt.partial"
    partial.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"last.ckpt' could not be written: \[Errno 28\] No space left on device"):
        AtomicFiles().save_checkpoint({"weight": torch.zeros(100_000)}, tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt") == {"step": 1}
    assert not partial.exists()


@pytest.mark.parametrize("renames", range(3))
def test_whenever_a_directory_is_abandoned_one_is_intact(
    renames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash after so many renames of the second save."""
    target = tmp_path / "last.ckpt"

    def save(step: int) -> None:
        with replaced_directory(target, is_first=True, barrier=lambda: None) as directory:
            (directory / "step").write_text(str(step))

    save(1)
    rename, left = Path.rename, iter(range(renames))

    def dying(path: Path, to: Path) -> Path:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return rename(path, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dying)
        if renames < 2:
            with pytest.raises(KeyboardInterrupt):
                save(2)
        else:
            save(2)
    assert (intact(target) / "step").read_text() == ("1" if renames < 2 else "2")
    save(3)
    assert (intact(target) / "step").read_text() == "3"
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_what_would_be_ignored_is_refused() -> None:
    """DeepSpeed and FSDP2 take no notice of Lightning's plugin."""
    fsdp2 = FSDP2()
    fsdp2.checkpoint_io = AsyncCheckpointIO()
    with pytest.raises(ValueError, match=r"nothing for sharded weights: use observe_r1.checkpoint_io.AsyncCheckpoints"):
        prepare(fsdp2)
    deepspeed = DeepSpeedStrategy.__new__(DeepSpeedStrategy)  # made, it wants DeepSpeed
    deepspeed._checkpoint_io = AsyncCheckpoints()
    with pytest.raises(ValueError, match=r"DeepSpeed writes its own: take them out, or use fsdp2"):
        prepare(deepspeed)
    with pytest.raises(ValueError, match="snapshots is 0: use 1 or more"):
        AsyncCheckpoints(snapshots=0)


def test_other_strategies_write_whole_files_without_being_told() -> None:
    strategy = DDPStrategy()
    prepare(strategy)
    assert isinstance(strategy.checkpoint_io, AtomicFiles)
    names = [name for name in StrategyRegistry.available_strategies() if name.startswith("deepspeed")]
    assert len(names) > 5
    assert all(StrategyRegistry[name]["strategy"] is DeepSpeed for name in names)
    assert StrategyRegistry["deepspeed_stage_3_offload"]["init_params"]["offload_parameters"]


@pytest.mark.slow
def test_the_run_is_the_same(tmp_path: Path, tiny_ladder: Path, command_line: Any) -> None:
    """With the overlay, older checkpoints go and the last and the best stay; both hold what they hold without it."""
    arguments = [argument for argument in TRAINING if "lora" not in argument]
    arguments += ["--trainer.callbacks.save_top_k=1", f"--data.ladder={tiny_ladder}"]
    for name, overlay in (("plain", []), ("async", ["--config=checkpoints/async.yaml"])):
        (tmp_path / name).mkdir()
        command_line(tmp_path / name)(*arguments[:2], *overlay, *arguments[2:])
    plain, asynchronous = (sorted((tmp_path / name / "checkpoints").iterdir()) for name in ("plain", "async"))
    assert [path.name for path in asynchronous] == [path.name for path in plain]
    assert len(plain) == 2
    one, other = final_state(tmp_path / "plain"), final_state(tmp_path / "async")
    for part in ("state_dict", "optimizer_states", "global_step", "NeuraLadderDataModule"):
        assert_equal(one[part], other[part], part)
