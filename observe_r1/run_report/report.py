"""The command."""

from __future__ import annotations

import webbrowser
from pathlib import Path

from rich.console import Console

PAGE = "report.html"


def report_run(run_directory: Path, output: Path | None = None, open: bool = False) -> None:
    """Show a run on one HTML page that needs nothing else: curves, completions with their pictures, times, config.

    Works on a run that still goes on or was cut off. Runs that this one resumed are found by its config and come first.

    Args:
        run_directory: Of the run, such as runs/quickstart/version_0.
        output: The HTML file; null: `report.html` in the run directory.
        open: Also open it in the browser.

    Raises:
        ValueError: The directory holds no run.
    """
    from observe_r1.run_report.page import page
    from observe_r1.run_report.run import read_run

    console = Console()
    with console.status("Reading the run"):
        text = page(read_run(run_directory))
    path = output or run_directory / PAGE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    console.print(f"Report: {path} ({len(text.encode()) / 1e6:.1f} MB)", markup=False, soft_wrap=True)
    if open:
        webbrowser.open(path.resolve().as_uri())
