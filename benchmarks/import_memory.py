"""Peak memory and speed of `observe-r1 ladder import` as its input grows: flat, or growing with the rows?

python benchmarks/import_memory.py [--rows 20000 200000] [--kinds json jsonl parquet]

Every row has a question of 200 characters, a PNG of 8 × 8 pixels (a file for JSON, embedded for parquet) and a
difficulty, so that the ladder is sorted and mixed. Each import runs in a process of its own; Linux.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from PIL import Image

CHUNK = 1000  # rows that are written at once

IMPORT = """
import sys
from pathlib import Path
from observe_r1.ladder.importers import import_ladder
from_rows = import_ladder(Path(sys.argv[1]), Path(sys.argv[2]))
assert from_rows.samples == int(sys.argv[3]), from_rows
print(*(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def rows(count: int, image: object) -> Iterator[dict[str, object]]:
    for number in range(count):
        question = f"Question {number}: " + "how many of them are there in all? " * 5
        yield {"question": question, "answer": str(number % 97), "image": image, "difficulty": number % 9 / 8}


def write(path: Path, count: int) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, format="PNG")
    (path.parent / "picture.png").write_bytes(buffer.getvalue())
    if path.suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        table = list(rows(CHUNK, {"bytes": buffer.getvalue(), "path": None}))
        schema = pa.Table.from_pylist(table).schema
        with parquet.ParquetWriter(path, schema) as writer:
            for _ in range(count // CHUNK):
                writer.write_table(pa.Table.from_pylist(table, schema))
        return
    with path.open("w") as file:
        is_list = path.suffix == ".json"
        for number, row in enumerate(rows(count, "picture.png")):
            separator = ("[" if number == 0 else ",") if is_list else ""
            file.write(separator + json.dumps(row) + "\n")
        file.write("]" if is_list else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 200_000])
    parser.add_argument("--kinds", nargs="+", default=["json", "jsonl", "parquet"])
    arguments = parser.parse_args()
    for kind in arguments.kinds:
        for count in arguments.rows:
            with tempfile.TemporaryDirectory() as directory:
                path = Path(directory) / f"rows.{kind}"
                write(path, count)
                started = time.perf_counter()
                command = [sys.executable, "-c", IMPORT, str(path), f"{directory}/ladder", str(count)]
                finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                result = {
                    "kind": kind,
                    "rows": count,
                    "input_mb": round(path.stat().st_size / 1e6, 1),
                    "peak_mb": round(int(finished.stdout) / 1e3, 1),
                    "seconds": round(time.perf_counter() - started, 1),
                    "python": platform.python_version(),
                    "webdataset": version("webdataset"),
                    "pyarrow": version("pyarrow") if kind == "parquet" else None,
                    "ijson": version("ijson"),
                }
                print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
