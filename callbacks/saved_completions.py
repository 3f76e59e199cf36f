"""Completions in the files of a run: a JSON line each, and small copies of the pictures they are about."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from observe_r1.callbacks.media.completions_picture import question_of
from observe_r1.experience import Prompt, PromptGroup
from observe_r1.thumbnails import thumbnail

DIRECTORY = "completions"  # in the run directory
MAX_PICTURES = 4  # of a question


def save_completions(
    run_directory: Path, name: str, groups: Sequence[PromptGroup], step: int, with_pictures: int
) -> None:
    """Appends all completions of the groups to `completions/NAME`, with pictures of the first so many groups."""
    directory = run_directory / DIRECTORY
    directory.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for number, group in enumerate(groups):
        pictures = _save_pictures(group.prompt.prompt, directory / "images") if number < with_pictures else []
        lines += (json.dumps(row, ensure_ascii=False) + "\n" for row in _rows(group, step, pictures))
    with (directory / name).open("a", encoding="utf-8") as file:
        file.writelines(lines)


def _save_pictures(prompt: Prompt, directory: Path) -> list[str]:
    """Names of the files, which come from what is in them: a question that comes again adds none."""
    directory.mkdir(exist_ok=True)
    names = []
    for image in prompt.images[:MAX_PICTURES]:
        data, extension = thumbnail(image)
        path = directory / f"{hashlib.sha256(data).hexdigest()[:16]}.{extension}"
        if not path.exists():
            path.write_bytes(data)
        names.append(path.name)
    return names


def _rows(group: PromptGroup, step: int, pictures: Sequence[str]) -> list[dict[str, Any]]:
    assert group.scores is not None
    scores, prompt = group.scores, group.prompt.prompt
    return [
        {
            "step": step,
            "id": prompt.id,
            "position": prompt.position,
            "difficulty": prompt.difficulty,
            "question": question_of(prompt),
            "images": list(pictures),
            "gold": prompt.gold.answer,
            "completion": completion.text,
            "tokens": len(completion),
            "truncated": completion.truncated,
            "reward": round(float(scores.reward[number]), 6),
            **{f"reward/{name}": round(float(part[number]), 6) for name, part in scores.parts.items()},
            "correct": bool(scores.correct[number]),
            "advantage": round(float(scores.advantage[number]), 6),
            "weight": round(scores.weight, 6),
        }
        for number, completion in enumerate(group.completions)
    ]
