"""Every fenced block of README.md and docs/ is executed, or a comment before it says what is done instead.

    <!-- run with: ARGUMENTS -->    these are added to what trains or evaluates, to keep it short
    <!-- parsed only: REASON -->    the commands are parsed with all their configs, and not run
    <!-- run by: TEST -->           that file runs it; it has to name the page
    <!-- not run: REASON -->

Blocks of a page run in its order, in one directory. A first line `# name.py` or `# name.yaml` names the file that a
block is written to. Python runs, YAML is parsed behind the quick start, JSON is read, commands run in bash, `math`
becomes MathML, and `text` is not code.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import latex2mathml.converter
import pytest
from sybil import Document
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMENTS = re.compile(r"(?:<!--[^>]*-->\s*)*\Z")
MARKER = re.compile(r"<!-- (run with|parsed only|run by|not run): ([^>]+?) -->")
RESULTS = {  # what has to be there when a page has run
    "your_data": ("data/shapes/held_out/ladder.json", "inspection.html", "runs/shapes/version_0/summary.json"),
    "extending": ("runs/quickstart/*/evaluation/shelf/*.json",),
    "resuming": ("runs/quickstart/version_1/hf/model.safetensors", "runs/quickstart/version_2/summary.json"),
}
FILE = re.compile(r"# ([\w./]+\.(?:py|yaml))\b")


@dataclass
class Block:
    """A fenced block and what the comments before it say."""

    place: str
    language: str
    text: str
    markers: dict[str, str]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in its order."""
    document = Document(page.read_text(), str(page))
    found = []
    for region in FencedCodeBlockLexer(r"[\w-]*", mapping={"language": "language", "source": "source"})(document):
        before = document.text[: region.start]
        comments = COMMENTS.search(before)
        assert comments is not None
        place = f"{page.name}:{before.count(chr(10)) + 1}"
        markers = dict(MARKER.findall(comments[0]))
        found.append(Block(place, region.lexemes["language"], str(region.lexemes["source"]), markers))
    return found


def execute(block: Block, directory: Path, commands: Any) -> None:
    """Does with a block what its language and its markers say."""

    def run(script: str, **environment: str) -> None:
        code, output = commands(directory, script, COLUMNS="160", **environment)
        assert code == 0, f"exit code {code}\n{output[-6000:]}"

    named = FILE.match(block.text)
    file = directory / (named[1] if named else f"block.{block.language}")
    file.write_text(block.text)  # whatever else is done with it: later blocks may use the file
    if "not run" in block.markers:
        return
    if "run by" in block.markers:
        test, page = ROOT / block.markers["run by"], block.place.partition(":")[0]
        assert page in test.read_text(), f"{test} does not name the page"
        return
    if block.language == "python":
        run(f"python {file.name}")
    elif block.language == "yaml":
        run(f"observe-r1 fit --config quickstart.yaml --config {file.name}", OBSERVE_R1_DOCS_PARSE="1")
    elif block.language == "json":
        for line in block.text.splitlines():
            json.loads(line)
    elif block.language == "bash":
        parse = {"OBSERVE_R1_DOCS_PARSE": "1"} if "parsed only" in block.markers else {}
        run(block.text, OBSERVE_R1_DOCS_WITH=block.markers.get("run with", ""), **parse)
    elif block.language == "math":
        formula = latex2mathml.converter.convert(block.text)
        assert "\\" not in formula, f"what is not understood is left as it is: {formula}"
    else:
        assert block.language == "text", f"a block of language {block.language!r}: say what it is, or mark it `text`"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_of(page: Path, tmp_path: Path, commands: Any) -> None:
    for block in blocks(page):
        try:
            execute(block, tmp_path, commands)
        except AssertionError as error:
            pytest.fail(f"{block.place}\n{error}", pytrace=False)
    for result in RESULTS.get(page.stem, ()):
        assert list(tmp_path.glob(result)), result
    if page.stem == "resuming":
        assert not (tmp_path / "runs/quickstart/version_0/summary.json").exists(), "it was not killed in the middle"


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "```bash\nfalse\nls\n```",
        "```bash\nobserve-r1 audit nowhere\n```",
        "<!-- parsed only: x -->\n```bash\nobserve-r1 fit --config quickstart.yaml --model.sampling.temprature 1\n```",
        "<!-- parsed only: x -->\n```bash\nobserve-r1 export last.ckpt out --dtipe float32\n```",
        "```yaml\nmodel: {sampling: {temprature: 1}}\n```",
        "```python\nimport observe_r1.nothing\n```",
        '```json\n{"a": 1}\n{"b": 1\n```',
        "```toml\na = 1\n```",
        "<!-- run by: tests/test_tags.py -->\n```bash\nls\n```",
        "<!-- any remark -->\n```bash\nfalse\n```",
    ],
)
def test_what_does_not_run_is_found(text: str, tmp_path: Path, commands: Any) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n{text}\n")
    (block,) = blocks(page)
    with pytest.raises((AssertionError, ValueError)):
        execute(block, tmp_path, commands)


def test_every_fence_is_found() -> None:
    """The blocks that are executed are all there are: as many as the lines that open and close one, halved."""
    for page in PAGES:
        fences = sum(line.lstrip().startswith("```") for line in page.read_text().splitlines())
        assert len(blocks(page)) * 2 == fences, page.name
