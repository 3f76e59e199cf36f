"""A ladder of a million samples: opening it, starting in it, memory; and the speed of reading beside plain loops.

    python benchmarks/streaming.py DIRECTORY           # a table; writes 2.3 GB below DIRECTORY, which are used again
    python benchmarks/streaming.py DIRECTORY --json    # one JSON object per line

"Plain" is a loop over one tar after the other with `tarfile` for the bytes, and `PIL.Image.open(…).convert("RGB")` on
bytes in memory for decoding. Ours does the same work and everything it does in a run: checksum, JSON, schema, header
check. Both sides alternate in one process and have to give the same bytes and pixels. Exit status 1: a missed target.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from paired import Ratio, machine
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from observe_r1.datamodules.prompt_stream import PromptStream
from observe_r1.experience import EncodedPrompt, Prompt, Skipped
from observe_r1.ladder.images import StoredImage
from observe_r1.ladder.reader import LadderDataset
from observe_r1.ladder.sample import Sample
from observe_r1.ladder.shards import write_ladder

SAMPLES, START = 1_000_000, 900_000
ROUNDS = 9
LIMITS = {"open": 2.0, "start": 1.0, "memory": 300e6}
AT_LEAST = 0.8  # of the speed of the plain loop

Result = dict[str, Any]


# ---- a million samples ----------------------------------------------------------------------------------------------


class TokensOnly:
    """Stands where the encoder does: a million tiny images say nothing about a processor."""

    def __init__(self, ladder: LadderDataset) -> None:
        self.ladder = ladder

    def __getitem__(self, position: int) -> EncodedPrompt | Skipped:
        import torch

        sample = self.ladder[position]
        tokens = torch.zeros(1, dtype=torch.long)
        return EncodedPrompt(sample, tokens, tokens) if isinstance(sample, Prompt) else sample


def question(number: int, image: StoredImage) -> Sample[StoredImage]:
    content = [{"type": "image", "index": 0}, {"type": "text", "text": f"What is the area of triangle {number}?"}]
    return Sample(
        id=f"sample-{number}",
        messages=[{"role": "user", "content": content}],
        answer=str(number % 97),
        images=[image],
        difficulty=number * 9 // SAMPLES / 8,
        n_correct=4,
        n_rollouts=8,
        complexity=300.0,
    )


def million(directory: Path) -> Path:
    """A ladder of a million samples with an image of 8 × 8 pixels each."""
    ladder = directory / "million"
    if not ladder.exists():
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), "red").save(buffer, format="PNG")
        image = StoredImage(buffer.getvalue(), "png")
        numbers = track(range(SAMPLES), "writing a million samples", console=Console(stderr=True))
        write_ladder((question(number, image) for number in numbers), ladder, samples_per_shard=1000)
    return ladder


def open_and_start(directory: Path, order: str, workers: int) -> Result:
    """Seconds to open the ladder, seconds to the first prompts after START, and how the process grows meanwhile."""
    process = psutil.Process()
    before = process.memory_info().rss
    started = time.perf_counter()
    ladder = LadderDataset(million(directory))
    opened = time.perf_counter()
    assert len(ladder) == SAMPLES
    stream = PromptStream(TokensOnly(ladder), SAMPLES, order, workers=workers, world_size=8)  # type: ignore[arg-type]
    stream.load_state_dict({"epoch": 0, "position": START, "skipped": {}})
    drawn = stream.draw(64)
    finished = time.perf_counter()
    assert len(drawn) == 8
    if order == "ladder":
        assert [prompt.prompt.position for prompt in drawn] == list(range(START, START + 64, 8))
    grown = process.memory_info().rss - before
    return {"open": opened - started, "start": finished - opened, "memory": grown}


def scale(directory: Path, rounds: int) -> Iterator[Result]:
    million(directory)
    for order in ("ladder", "random"):
        for workers in (0, 2):
            command = [sys.executable, __file__, str(directory), "--case", order, "--workers", str(workers)]
            runs = [
                json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
                for _ in range(rounds)
            ]
            medians = {name: statistics.median(run[name] for run in runs) for name in LIMITS}
            yield {
                "case": f"{SAMPLES:,} samples, order {order}, {workers} workers",
                "medians": medians,
                "limits": LIMITS,
                "rounds": runs,
                "reached": all(medians[name] < limit for name, limit in LIMITS.items()),
            }


# ---- speed ----------------------------------------------------------------------------------------------------------


def picture(kind: str, generator: np.random.Generator) -> StoredImage:
    """A photograph-like JPEG or a diagram-like PNG."""
    buffer = io.BytesIO()
    if kind == "photo":
        coarse = generator.integers(0, 256, (28, 28, 3), dtype=np.uint8)
        smooth = np.array(Image.fromarray(coarse).resize((448, 448), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = np.clip(smooth + generator.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(buffer, format="JPEG", quality=90)
        return StoredImage(buffer.getvalue(), "jpg")
    pixels = np.full((448, 448, 3), 255, dtype=np.uint8)
    for _ in range(12):
        (top, left), colour = generator.integers(0, 400, 2), generator.integers(0, 256, 3)
        pixels[top : top + 40, left : left + 40] = colour
    Image.fromarray(pixels).save(buffer, format="PNG")
    return StoredImage(buffer.getvalue(), "png")


def pictures(directory: Path, kind: str) -> Path:
    ladder = directory / kind
    if not ladder.exists():
        generator = np.random.default_rng(0)
        samples = (question(number, picture(kind, generator)) for number in range(1000))
        write_ladder(samples, ladder, samples_per_shard=250)
    return ladder


def tar_loop(ladder: Path, mode: str, shards: int) -> list[bytes]:
    contents = []
    for tar in sorted(ladder.glob("*.tar"))[:shards]:
        with tarfile.open(tar, mode) as archive:  # type: ignore[call-overload]
            for member in archive:
                file = archive.extractfile(member)
                contents.append(file.read())
    return contents


def plain_decoding(contents: list[bytes]) -> list[Image.Image]:
    images = []
    for content in contents:
        with Image.open(io.BytesIO(content)) as image:
            images.append(image.convert("RGB"))
    return images


def alternate(plain: Callable[[], Any], ours: Callable[[], Any], rounds: int) -> list[float]:
    """How fast ours is, as a multiple of plain, in every round; who begins changes."""
    ratios = []
    for number in range(rounds):
        seconds = {}
        for name, run in ((("plain", plain), ("ours", ours)), (("ours", ours), ("plain", plain)))[number % 2]:
            started = time.perf_counter()
            run()
            seconds[name] = time.perf_counter() - started
        ratios.append(seconds["plain"] / seconds["ours"])
    return ratios


def speed(directory: Path, rounds: int) -> Iterator[Result]:
    for kind, ladder, shards in (
        ("8 × 8 px PNG", million(directory), 4),
        ("448 px PNG", pictures(directory, "diagram"), 4),
        ("448 px JPEG", pictures(directory, "photo"), 4),
    ):
        dataset = LadderDataset(sorted(ladder.glob("*.tar"))[:shards])
        count = len(dataset)

        def bytes_of_all(dataset: LadderDataset = dataset) -> list[bytes]:
            return [data for position in range(len(dataset)) for data in dataset.stored(position).values()]

        for mode in ("r|", "r:"):
            plain = partial(tar_loop, ladder, mode, shards)
            assert sorted(bytes_of_all()) == sorted(plain())
            ratios = alternate(plain, bytes_of_all, rounds)
            yield Ratio(f"decoding off, {kind}, tarfile {mode}", ratios, AT_LEAST).to_document() | {"samples": count}
        if kind.startswith("8"):
            continue  # pictures this small are not what decoding is about
        contents = [data for position in range(count) for data in list(dataset.stored(position).values())[1:]]
        prompts = [dataset[position] for position in range(count)]
        assert all(isinstance(prompt, Prompt) for prompt in prompts)
        decoded = plain_decoding(contents)
        assert all(p.images[0].tobytes() == image.tobytes() for p, image in zip(prompts, decoded, strict=True))
        del prompts, decoded

        def prompts_of_all(dataset: LadderDataset = dataset) -> None:
            for position in range(len(dataset)):
                dataset[position]

        def decode_all(contents: list[bytes] = contents) -> None:
            for content in contents:
                plain_decoding([content])

        ratios = alternate(decode_all, prompts_of_all, rounds)
        yield Ratio(f"decoding on, {kind}", ratios, AT_LEAST).to_document() | {"samples": count}


def show(documents: list[Result]) -> None:
    console = Console()
    console.print(documents[0]["machine"])
    table = Table("measured", "median", "target", "")
    for document in documents[1:]:
        verdict = "[green]reached" if document["reached"] else "[red]missed"
        if "ratio" in document:
            table.add_row(document["ratio"], f"{document['median']:.2f} × plain", f"≥ {document['target']}", verdict)
        else:
            medians = document["medians"]
            figures = f"open {medians['open']:.2f} s, start {medians['start']:.2f} s, {medians['memory'] / 1e6:.0f} MB"
            table.add_row(document["case"], figures, "< 2 s, < 1 s, < 300 MB", verdict)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(open_and_start(options.directory, options.case, options.workers)))
        return
    options.directory.mkdir(parents=True, exist_ok=True)
    packages = ("torch", "pillow", "numpy", "webdataset")
    documents: list[Result] = [{"machine": machine(1, packages)}]
    documents += [*scale(options.directory, options.rounds), *speed(options.directory, options.rounds)]
    if options.json:
        print("\n".join(json.dumps(document) for document in documents))
    else:
        show(documents)
    sys.exit(not all(document.get("reached", True) for document in documents))


if __name__ == "__main__":
    main()
