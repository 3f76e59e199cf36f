"""A ladder of a million samples: opening it, starting in it, memory; and the speed of reading beside plain loops.

    python benchmarks/streaming.py DIRECTORY           # a table; writes 2.3 GB below DIRECTORY, which are used again
    python benchmarks/streaming.py DIRECTORY --json    # one JSON object per line

"Plain" is a loop over one tar after the other with `tarfile` for the bytes, and `PIL.Image.open(…).convert("RGB")` for
the pixels: of every image on its way out of that loop, or of bytes that are in memory already. Ours does the same work
and everything it does in a run: checksum, JSON, schema, gold answer (a different one in every sample), header check.
Both sides alternate in one process and have to give the same bytes and pixels. Exit status 1: a missed target.
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
from itertools import chain
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
ROUNDS = 7
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
        answer=f"{number / 7:.3f} cm^2",
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


def picture(kind: str, side: int, generator: np.random.Generator) -> StoredImage:
    """A photograph-like JPEG or a diagram-like PNG."""
    buffer = io.BytesIO()
    if kind == "JPEG":
        coarse = generator.integers(0, 256, (28, 28, 3), dtype=np.uint8)
        smooth = np.array(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = np.clip(smooth + generator.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(buffer, format="JPEG", quality=90)
        return StoredImage(buffer.getvalue(), "jpg")
    pixels = np.full((side, side, 3), 255, dtype=np.uint8)
    for _ in range(12):
        (top, left), colour = generator.integers(0, side - 40, 2), generator.integers(0, 256, 3)
        pixels[top : top + 40, left : left + 40] = colour
    Image.fromarray(pixels).save(buffer, format="PNG")
    return StoredImage(buffer.getvalue(), "png")


def pictures(directory: Path, kind: str, side: int, count: int) -> Path:
    """A ladder of `count` samples in four shards."""
    ladder = directory / f"{kind}-{side}"
    if not ladder.exists():
        generator = np.random.default_rng(0)
        samples = (question(number, picture(kind, side, generator)) for number in range(count))
        write_ladder(samples, ladder, samples_per_shard=count // 4)
    return ladder


def tar_loop(ladder: Path, mode: str, shards: int) -> list[bytes]:
    contents = []
    for tar in sorted(ladder.glob("*.tar"))[:shards]:
        with tarfile.open(tar, mode) as archive:  # type: ignore[call-overload]
            for member in archive:
                file = archive.extractfile(member)
                contents.append(file.read())
    return contents


def decoded(content: bytes) -> Image.Image:
    with Image.open(io.BytesIO(content)) as image:
        return image.convert("RGB")


def tar_and_decode(ladder: Path) -> None:
    for tar in sorted(ladder.glob("*.tar")):
        with tarfile.open(tar) as archive:
            for member in archive:
                content = archive.extractfile(member).read()
                if not member.name.endswith(".json"):
                    decoded(content)


def alternate(plain: Callable[[], Any], ours: Callable[[], Any], rounds: int) -> list[float]:
    """How fast ours is, as a multiple of plain, in every round; who begins changes.

    By CPU time, system calls included: the files are in the page cache, and a shared machine interrupts both sides.
    """
    ratios = []
    for number in range(rounds):
        seconds = {}
        for name, run in ((("plain", plain), ("ours", ours)), (("ours", ours), ("plain", plain)))[number % 2]:
            started = time.process_time()
            run()
            seconds[name] = time.process_time() - started
        ratios.append(seconds["plain"] / seconds["ours"])
    return ratios


def speed(directory: Path, rounds: int) -> Iterator[Result]:
    yield from reading("8 px PNG", million(directory), 4, rounds)
    for kind, side, count in (("PNG", 448, 1000), ("JPEG", 448, 1000), ("JPEG", 1024, 200)):
        ladder = pictures(directory, kind, side, count)
        yield from reading(f"{side} px {kind}", ladder, 4, rounds)
        yield from decoding(f"{side} px {kind}", ladder, rounds)


def reading(name: str, ladder: Path, shards: int, rounds: int) -> Iterator[Result]:
    dataset = LadderDataset(sorted(ladder.glob("*.tar"))[:shards])

    def ours() -> list[bytes]:
        return [data for position in range(len(dataset)) for data in dataset.stored(position).values()]

    for mode in ("r|", "r:"):
        plain = partial(tar_loop, ladder, mode, shards)
        assert sorted(ours()) == sorted(plain())
        yield Ratio(f"bytes, {name}, tarfile {mode}", alternate(plain, ours, rounds), AT_LEAST).to_document()


def decoding(name: str, ladder: Path, rounds: int) -> Iterator[Result]:
    dataset = LadderDataset(ladder)
    contents = [data for position in range(len(dataset)) for data in list(dataset.stored(position).values())[1:]]
    for position, content in enumerate(contents):
        prompt = dataset[position]
        assert isinstance(prompt, Prompt)
        assert prompt.images[0].tobytes() == decoded(content).tobytes()

    def ours() -> None:
        for position in range(len(dataset)):
            dataset[position]

    def in_memory() -> None:
        for content in contents:
            decoded(content)

    from_tar = alternate(partial(tar_and_decode, ladder), ours, rounds)
    yield Ratio(f"pixels, {name}, tarfile and PIL", from_tar, AT_LEAST).to_document()
    yield Ratio(f"pixels, {name}, PIL in memory", alternate(in_memory, ours, rounds), AT_LEAST).to_document()


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
    documents: list[Result] = []
    measured = chain(scale(options.directory, options.rounds), speed(options.directory, options.rounds))
    for document in chain([{"machine": machine(1, packages)}], measured):
        documents.append(document)
        if options.json:
            print(json.dumps(document), flush=True)
    if not options.json:
        show(documents)
    sys.exit(not all(document.get("reached", True) for document in documents))


if __name__ == "__main__":
    main()
