"""The frame of the HTML pages that we write: one file each, light and dark, and nothing is loaded from anywhere."""

from __future__ import annotations

import base64
import hashlib
from html import escape

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d2430; --soft: #5d6879; --line: #d9dee7; --bar: #3b6fd4;
  --card: #f6f8fb; }
@media (prefers-color-scheme: dark) { :root { --paper: #12161d; --ink: #e6e9ef; --soft: #9aa4b5; --line: #333b48;
  --card: #1b212b; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 80rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; } .soft { color: var(--soft); }
.columns { display: flex; flex-wrap: wrap; gap: 2rem; } .columns > div { flex: 1 1 20rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .15rem .5rem; text-align: right; font-weight: normal; }
th:first-child { text-align: left; white-space: nowrap; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(15rem, 100%), 1fr)); gap: 1rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .7rem; font-size: .88rem; }
.card img { max-width: 100%; display: block; margin: 0 auto .5rem; background: #fff; }
.card p { margin: .35rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def frame(title: str, body: str, style: str = "", script: str = "") -> str:
    """A whole page; `body` is HTML, `style` comes after the common one, and no script but this one is run."""
    allowed = f"script-src '{_hash(script)}'; " if script else ""
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; {allowed}base-uri 'none'; form-action 'none'"
    )
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head><body>\n{body}\n"
        + (f"<script>{script}</script>" if script else "")
        + "</body></html>\n"
    )


def _hash(script: str) -> str:
    """As a Content-Security-Policy names an inline script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"
