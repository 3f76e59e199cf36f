"""Hooks of the documentation site: pages that lie outside of docs/, and formulas.

The same files are read on a code host and as a site. README, changelog and benchmarks become pages of the site, the
configurations one page, and other files that a page links to (results, modules) are copied beside the pages.
"""

from __future__ import annotations

import atexit
import posixpath
import re
import shutil
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent.parent
PAGES = {  # in the repository: in the site
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
    "configs": "configs.md",
}
SECTIONS = ("description", "parameters", "returns", "raises")  # of a docstring, which the source repeats
HIDDEN = "".join(f", show_docstring_{section}: false" for section in SECTIONS)
SOURCE_ALONE = f"options: {{show_source: true, show_signature: false, separate_signature: false{HIDDEN}}}"
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)\s#]+)(?=[)#])")


@event_priority(100)  # before mkdocstrings reads its settings
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [installed_tree()]
    math = {"name": "math", "class": "math", "format": formula}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [math]}
    return config


def installed_tree() -> str:
    """A folder with the packages where they lie once installed: callbacks and datamodules inside of observe_r1."""
    tree = Path(tempfile.mkdtemp(prefix="observe_r1-docs-"))
    atexit.register(shutil.rmtree, tree)
    shutil.copytree(ROOT / "observe_r1", tree / "observe_r1")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for name, folder in settings["package-dir"].items():
        shutil.copytree(ROOT / folder, tree / name.replace(".", "/"))
    return str(tree)


def formula(source: str, language: str, css_class: str, options: Any, md: Any, **_: Any) -> str:
    """A `math` block as MathML, which browsers show without a script."""
    return f'<div class="{css_class}">{convert(source, display="block")}</div>'


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for origin, name in PAGES.items():
        if (ROOT / origin).is_file():
            files.append(File.generated(config, name, abs_src_path=str(ROOT / origin)))
    files.append(File.generated(config, "configs.md", content=shipped_configs()))
    for page in list(files.documentation_pages()):
        for target in LINK.findall(page.content_string):
            linked = _in_repository(page, target)
            if (ROOT / linked).is_file() and files.get_file_from_path(_in_site(linked)) is None:
                files.append(File.generated(config, linked, abs_src_path=str(ROOT / linked)))
    return files


def shipped_configs() -> str:
    """A page with every configuration that is installed."""
    folder = ROOT / "configs"
    paths = sorted(folder.rglob("*.yaml"), key=lambda path: (len(path.relative_to(folder).parts), path))
    blocks = (f"## {path.relative_to(folder)}\n\n```yaml\n{path.read_text()}```\n" for path in paths)
    text = "`--config` takes these names wherever you are; later ones win, and each may hold only what differs."
    return "\n".join(["# Configurations", text, *blocks])


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    markdown = markdown.replace("options: {show_source: true}", SOURCE_ALONE)
    folder = posixpath.dirname(page.file.src_uri) or "."
    return LINK.sub(lambda link: posixpath.relpath(_in_site(_in_repository(page.file, link[1])), folder), markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Sources stand open where a page asks for them."""
    return html.replace('<details class="mkdocstrings-source">', '<details class="mkdocstrings-source" open>')


def _in_repository(page: File, target: str) -> str:
    """The path that a link of a page means, from the root of the repository."""
    origins = {name: origin for origin, name in PAGES.items()}
    origin = origins.get(page.src_uri, f"docs/{page.src_uri}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))


def _in_site(path: str) -> str:
    """Where a file of the repository lies among the pages."""
    return PAGES.get(path, path.removeprefix("docs/"))
