"""`observe-r1 ladder inspect`: an inspection on the terminal and as a page."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from observe_r1.ladder.inspection import Inspection, inspect
from observe_r1.ladder.inspection_page import write_page
from observe_r1.ladder.inspection_terminal import print_report

PAGE = "inspection.html"


def inspect_ladder(
    directory: Path, *, page: Path | None = None, examples: int = 3, limit: int | None = None
) -> Inspection:
    """Show what a ladder holds: on the terminal, and with pictures on an HTML page that needs nothing else.

    Args:
        directory: Of the ladder.
        page: The HTML file; null: `inspection.html` in the working directory.
        examples: Samples shown of every level.
        limit: Read no more than this many samples, spread evenly.

    Raises:
        ValueError: The directory holds no ladder, or a number is negative.
    """
    if examples < 0 or (limit is not None and limit < 1):
        raise ValueError(f"examples is {examples} and limit {limit}; they start at 0 and at 1")
    found = inspect(directory, examples, limit)
    console = Console()
    print_report(found, console)
    page = page or Path(PAGE)
    write_page(found, page)
    console.print(f"With pictures: {page}", markup=False, soft_wrap=True)
    return found
