"""What a run left in its directory, as far as it is there: a run may go on, or have ended in the middle of a line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from observe_r1.masking import masked, masked_text
from observe_r1.run_report.scalars import EVENT_FILES, TABLE, Scalars, read_scalars

CONFIG, SUMMARY, COMPLETIONS = "config.yaml", "summary.json", "completions"
TABLES = {"pass_rate": 1, "seconds": 1, "versions": 1, "skipped": 2, "verdicts": 2, "shards_with_problems": 2}
SIGNS = (CONFIG, SUMMARY, COMPLETIONS, TABLE, EVENT_FILES)  # any of these makes a directory a run


@dataclass
class Run:
    """A run: the directory that was asked for, and those of the runs that it resumed."""

    directories: list[Path]  # in the order of the training
    summary: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    scalars: Scalars = field(default_factory=Scalars)
    missing: list[str] = field(default_factory=list)

    @property
    def directory(self) -> Path:
        return self.directories[-1]

    def option(self, *path: str) -> Any:
        """A value of the config, or None."""
        value: Any = self.config
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value


def read_run(directory: Path) -> Run:
    """Reads a run directory.

    Raises:
        ValueError: There is no run; the message names those that are near.
    """
    _check(directory)
    run = Run([directory])
    run.config_text, run.config = _config(directory, run.missing)
    _follow_resumes(run)
    run.summary = _summary(directory, run.missing)
    run.scalars = read_scalars(run.directories)
    run.missing += run.scalars.problems
    if not run.scalars.series:
        run.missing.append(
            "Curves: no TensorBoard event files and no metrics.csv hold figures here. W&B and MLflow keep theirs "
            "elsewhere; with TensorBoardLogger or CSVLogger as the first logger they are in the run directory too."
        )
    return run


def _check(directory: Path) -> None:
    if not directory.is_dir():
        raise ValueError(
            f"{directory} is no directory. Give the directory of a run, such as runs/quickstart/version_0."
        )
    if any(any(directory.glob(sign)) for sign in SIGNS):
        return
    patterns = (*(f"*/{sign}" for sign in SIGNS[:2]), f"*/*/{CONFIG}")
    near = sorted({path.parent for pattern in patterns for path in directory.glob(pattern)}, key=_changed)
    if not near:
        raise ValueError(
            f"{directory} holds no run: none of {', '.join(SIGNS)}. Give the directory that a training has printed or "
            "made, such as runs/quickstart/version_0."
        )
    names = ", ".join(map(str, near[-8:]))
    raise ValueError(
        f"{directory} is no run itself, but holds some: {names}. Give one of them; the last is the newest."
    )


def _changed(path: Path) -> float:
    return path.stat().st_mtime


def _config(directory: Path, missing: list[str]) -> tuple[str, dict[str, Any]]:
    path = directory / CONFIG
    if not path.is_file():
        missing.append(f"Config: there is no {CONFIG}.")
        return "", {}
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        missing.append(f"Config: {CONFIG} is no YAML ({type(error).__name__}); it is shown as it is.")
        config = None
    if not isinstance(config, dict):
        return masked_text(text), {}
    shown: dict[str, Any] = masked(config)
    return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True), shown


def _summary(directory: Path, missing: list[str]) -> dict[str, Any]:
    path = directory / SUMMARY
    if not path.is_file():
        missing.append(
            f"Summary: there is no {SUMMARY}. The run still goes on, or was ended from outside; RunSummary writes it "
            "at the end."
        )
        return {}
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        missing.append(f"Summary: {SUMMARY} could not be read ({error}).")
        return {}
    if not isinstance(summary, dict):
        missing.append(f"Summary: {SUMMARY} holds no summary.")
        return {}
    odd = [name for name, depth in TABLES.items() if name in summary and not _is_table(summary[name], depth)]
    missing += [f"Summary: {name} is not as RunSummary writes it." for name in odd]
    found: dict[str, Any] = masked({name: value for name, value in summary.items() if name not in odd})
    return found


def _is_table(value: Any, depth: int) -> bool:
    return isinstance(value, dict) and (depth == 1 or all(_is_table(inner, depth - 1) for inner in value.values()))


def _follow_resumes(run: Run) -> None:
    """Puts the directories that were resumed in front, by the `ckpt_path` of the configs."""
    config, directory = run.config, run.directory
    while isinstance(config.get("ckpt_path"), str):
        checkpoint = Path(config["ckpt_path"])
        earlier = _resumed(checkpoint, directory)
        if earlier is None:
            run.missing.append(f"The part before the resume: {checkpoint} is in no run directory that is here.")
            return
        if earlier in [path.resolve() for path in run.directories]:
            return
        run.directories.insert(0, earlier)
        config, directory = _config(earlier, [])[1], earlier


def _resumed(checkpoint: Path, directory: Path) -> Path | None:
    """The run directory of a checkpoint, whose path may be relative to where the command was given."""
    depth = min(2, len(checkpoint.parts) - 1)  # `last` and the like name no directory
    for base in (Path.cwd(), *directory.resolve().parents):
        for candidate in (base / checkpoint).resolve().parents[:depth]:
            if (candidate / CONFIG).is_file():
                return candidate
    return None


def steps_done(run: Run) -> int | None:
    """Optimizer steps, from the summary or from the curves, which count from 0."""
    done = run.summary.get("optimizer_steps")
    if isinstance(done, int):
        return done
    trained: Sequence[int] = [
        int(series.steps[-1]) for name, series in run.scalars.series.items() if name.startswith("train/")
    ]
    return max(trained) + 1 if trained else None
