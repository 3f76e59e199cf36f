"""An inspection as one HTML page with its pictures in it: nothing is loaded from anywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from observe_r1.html_page import frame
from observe_r1.ladder.images import DEFAULT_MAX_PIXELS, StoredImage, load_rgb
from observe_r1.ladder.inspection import Inspection
from observe_r1.ladder.inspection_terminal import complexity_histogram, shards
from observe_r1.ladder.sample import BadSample, Sample
from observe_r1.ladder.stored import question_of
from observe_r1.thumbnails import SMALL_FILE, data_address, thumbnail

STYLE = """
.matrix { font-size: .8rem; } .matrix td { min-width: 2.6rem; padding: .2rem .3rem; border: 1px solid var(--line); }
.bars td:nth-child(3) { text-align: left; width: 14rem; }
.bar { background: var(--bar); height: .8rem; border-radius: 2px; }
.problems li { margin: .2rem 0; }
"""


def write_page(found: Inspection, path: Path) -> None:
    """Write the page of an inspection."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(found), encoding="utf-8")


def page(found: Inspection) -> str:
    """The HTML text."""
    held_out = f", {found.held_out} held out" if found.held_out else ""
    head = f"{found.samples:,} samples{held_out} in {shards(found)}, {found.bytes / 1e6:,.1f} MB"
    levels = {name: found.levels[name] for name in found.level_names}
    notes = {name: f"{tokens:.0f}" for name, tokens in found.tokens_by_level.items()}
    parts = [
        f"<h1>{escape(found.name)}</h1><p class='soft'>{head}</p>",
        _problems(found.problems),
        "<h2>What is in it</h2><div class='columns'>",
        f"<div>{_bars('difficulty', levels, notes, 'mean tokens')}</div>",
        f"<div>{_bars('complexity, tokens', complexity_histogram(found))}</div>" if found.complexities else "",
        f"<div>{_bars('source', dict(found.sources.most_common(15)))}</div>",
        f"<div>{_bars('answer', dict(found.answers.most_common()))}</div>",
        f"<div>{_bars('images', {str(n): found.images[n] for n in sorted(found.images)})}</div>",
        f"<div>{_bars('pixels of an image', _sizes(found))}</div>" if found.sizes else "",
        "</div>",
        _mixing(found) if found.stages else "",
        _built(found.built),
        "<h2>Examples</h2>" if found.examples else "",
        *(_examples(name, found.examples[name]) for name in found.level_names if found.examples.get(name)),
    ]
    return frame(found.name, "\n".join(part for part in parts if part), STYLE)


def _problems(problems: Sequence[str]) -> str:
    if not problems:
        return "<p>No problems found.</p>"
    items = "".join(f"<li>{escape(problem)}</li>" for problem in problems)
    return f"<h2>Problems found</h2><ul class='problems'>{items}</ul>"


def _bars(title: str, counts: Mapping[str, int], notes: Mapping[str, str] | None = None, note: str = "") -> str:
    largest = max(counts.values(), default=1)
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{count:,}</td>"
        f"<td><div class='bar' style='width:{100 * count / largest:.1f}%'></div></td>"
        f"<td>{escape(notes.get(name, '')) if notes else ''}</td></tr>"
        for name, count in counts.items()
    )
    return (
        f"<table class='bars'><tr class='soft'><th>{escape(title)}</th><td>samples</td><td></td><td>{note}</td></tr>"
        f"{rows}</table>"
    )


def _sizes(found: Inspection) -> dict[str, int]:
    return {f"{2**power:,} – {2 ** (power + 1) - 1:,}": found.sizes[power] for power in sorted(found.sizes)}


def _mixing(found: Inspection) -> str:
    stages, levels, obtained = found.obtained()
    sizes = [sum(found.stages.get(stage, {}).values()) for stage in stages]
    asked = found.asked()
    tables = f"<div><p class='soft'>obtained</p>{_heat(stages, levels, obtained, sizes)}</div>"
    if asked is not None and found.mixing is not None:
        tables += f"<div><p class='soft'>asked for</p>{_heat(found.mixing.stages, levels, asked, None)}</div>"
    return (
        "<h2>How the levels are mixed</h2><p class='soft'>A row is a stage of the training, a column a level of "
        f"difficulty; a row adds up to 100 %.</p><div class='columns'>{tables}</div>"
    )


def _heat(
    stages: Sequence[float], levels: Sequence[float], shares: Sequence[Sequence[float]], sizes: Sequence[int] | None
) -> str:
    head = "".join(f"<td>{level:g}</td>" for level in levels) + ("<td>samples</td>" if sizes else "")
    rows = ""
    for number, (stage, row) in enumerate(zip(stages, shares, strict=True)):
        cells = "".join(
            f"<td style='background:rgba(59,111,212,{0.85 * share:.2f})'>{f'{share:.1%}' if share else ''}</td>"
            for share in row
        )
        rows += f"<tr><th>{stage:g}</th>{cells}{f'<td>{sizes[number]:,}</td>' if sizes else ''}</tr>"
    return f"<table class='matrix'><tr class='soft'><th></th>{head}</tr>{rows}</table>"


def _built(built: Mapping[str, object]) -> str:
    """How the ladder was made, without the matrix, which is shown above."""
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td style='text-align:left'>{escape(_plain(value))}</td></tr>"
        for name, value in built.items()
        if name != "mixing" and value is not None
    )
    return f"<h2>How it was made</h2><table>{rows}</table>" if rows else ""


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _examples(level: str, samples: Sequence[Sample[StoredImage]]) -> str:
    cards = "".join(_card(sample) for sample in samples)
    return f"<h3>difficulty {escape(level)}</h3><div class='cards'>{cards}</div>"


def _card(sample: Sample[StoredImage]) -> str:
    pictures = "".join(_picture(image, n) for n, image in enumerate(sample.images))
    facts = [sample.id, sample.source]
    if sample.n_rollouts is not None and sample.n_correct is not None:
        facts.append(f"{sample.n_correct} of {sample.n_rollouts} right")
    if sample.complexity is not None:
        facts.append(f"{sample.complexity:.0f} tokens")
    choices = "".join(f"<br>{chr(ord('A') + n)}. {escape(choice)}" for n, choice in enumerate(sample.choices))
    return (
        f"<div class='card'>{pictures}<p>{escape(question_of(sample))}{choices}</p>"
        f"<p>→ <b>{escape(sample.answer)}</b></p>"
        f"<p class='soft'>{escape(' · '.join(fact for fact in facts if fact))}</p></div>"
    )


def _picture(image: StoredImage, number: int) -> str:
    try:
        return f"<img src='{picture(image)}' alt='image {number}'>"
    except BadSample as bad:  # its header is sound, which is all that was looked at so far
        return f"<p class='soft'>image {number}: {escape(str(bad))}</p>"


def picture(image: StoredImage) -> str:
    """The image as a data address, scaled down where it is large.

    Raises:
        BadSample: It is large, and damaged.
    """
    data, extension = image.data, image.extension
    if len(data) > SMALL_FILE:
        data, extension = thumbnail(load_rgb(f"{extension} image", data, DEFAULT_MAX_PIXELS))
    return data_address(data, extension)
