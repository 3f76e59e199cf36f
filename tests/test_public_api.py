"""The public names exist, say what they are, and are typed; what is promised about releases is kept."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import observe_r1
from observe_r1.public_api import PUBLIC
from observe_r1.requirements import misfits

ROOT = Path(__file__).parent.parent
NAMES = [(module, name) for module, names in PUBLIC.items() for name in names]


@pytest.mark.parametrize(("module", "name"), NAMES, ids=[name for _, name in NAMES])
def test_public_names_are_documented_and_typed(module: str, name: str) -> None:
    thing = getattr(importlib.import_module(module), name)
    own = str(vars(thing)["__doc__"] if inspect.isclass(thing) else thing.__doc__)
    assert own != "None"
    assert not own.startswith(f"{name}("), "made up by dataclasses"
    for function in [*public_functions(thing), *([thing] if inspect.isfunction(thing) else [])]:
        signature = inspect.signature(function)
        untyped = [
            p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name not in ("self", "cls")
        ]
        assert not untyped, f"{function.__qualname__}: {untyped}"
        assert signature.return_annotation is not signature.empty, function.__qualname__


def public_functions(thing: Any) -> list[Any]:
    """What a class itself defines, without what dataclasses generate."""
    own = [value for name, value in vars(thing).items() if not name.startswith("_") or name == "__init__"]
    own = [getattr(value, "__func__", getattr(value, "fget", value)) for value in own]
    return [f for f in own if inspect.isfunction(f) and Path(f.__code__.co_filename).is_file()]


@pytest.mark.parametrize("module", ["observe_r1.callbacks", "observe_r1.datamodules", "observe_r1.rollout"])
def test_packages_for_users_export_what_is_public(module: str) -> None:
    assert set(importlib.import_module(module).__all__) == set(PUBLIC[module])


def test_no_module_needs_an_extra_to_be_imported() -> None:
    """Those who use an extra name it (see the mistakes in tests/mistakes)."""
    code = (
        "import importlib, pkgutil, sys\n"
        "absent = {'vllm', 'deepspeed', 'flash_attn', 'peft', 'pyarrow', 'rapidfuzz', 'trl', 'pandas'}\n"
        "class Without:\n"
        "    def __init__(self, finder): self.finder = finder\n"
        "    def __getattr__(self, name): return getattr(self.finder, name)\n"
        "    def find_spec(self, name, *place):\n"
        "        return None if name.partition('.')[0] in absent else self.finder.find_spec(name, *place)\n"
        "sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]\n"
        "import observe_r1\n"
        "modules = [m.name for m in pkgutil.walk_packages(observe_r1.__path__, 'observe_r1.')]\n"
        "for name in modules:\n"
        "    if not name.endswith(('__main__', '.worker', 'sitecustomize')):\n"
        "        importlib.import_module(name)\n"
        "print(len(modules), absent & sys.modules.keys())\n"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    count, _, imported = finished.stdout.partition(" ")
    assert int(count) > 100
    assert imported.strip() == "set()"


GUARD = """
import ipaddress, os, sys
def guard(event, arguments):
    if event == "socket.connect":
        address = arguments[1]
        outside = isinstance(address, tuple) and not ipaddress.ip_address(address[0].partition("%")[0]).is_loopback
    elif event == "socket.getaddrinfo":
        outside = arguments[0] not in (None, "", "localhost", "127.0.0.1", "::1")
    else:
        return
    if outside:
        with open(os.environ["GUARD_FILE"], "a") as file:
            file.write(f"{event} {arguments}\\n")
        raise OSError("a connection that nobody asked for")
sys.addaudithook(guard)
"""


@pytest.mark.slow
def test_a_run_connects_to_nobody(tmp_path: Path) -> None:
    """No telemetry, ours or others': the quick start from its first line to its export, in all of its processes."""
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / "sitecustomize.py").write_text(GUARD)
    heard = tmp_path / "connections"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "WANDB_"))}
    environment |= {"PYTHONPATH": str(tmp_path / "guard"), "GUARD_FILE": str(heard), "OMP_NUM_THREADS": "1"}
    quick = ("--trainer.max_steps=2", "--data.train_questions=64", "--data.held_out_questions=8")
    finished = subprocess.run(
        [sys.executable, "-m", "observe_r1", "fit", "--config=quickstart.yaml", *quick, "--data.workers=1"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert list(tmp_path.glob("runs/**/hf/model.safetensors"))
    assert not heard.exists(), heard.read_text()
    probe = "import socket; socket.create_connection(('192.0.2.1', 9), 0.1)"
    subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, check=False)
    assert "192.0.2.1" in heard.read_text(), "the guard hears nothing"


def test_the_version_has_an_entry_in_the_changelog_and_is_cited() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## {re.escape(observe_r1.__version__)}\b", changelog, re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == observe_r1.__version__
    assert {"cff-version", "message", "title", "authors", "license"} <= citation.keys()


def test_versions_that_do_not_fit_are_named() -> None:
    declared = [
        "torch<2",
        "nosuch>=3",
        'peft>=99; extra == "lora"',
        'nosuch2>=3; extra == "lora"',
        'torch<1; extra == "bench"',
        'torch<1; python_version < "3"',
        "numpy>=2",
    ]
    found = dict(misfits(declared))
    assert list(found.values()) == ["torch<2", "nosuch>=3", "peft>=99"]
    assert re.match(r"torch \d", next(iter(found)))


def test_incompatible_versions_are_refused_before_anything_is_imported(tmp_path: Path) -> None:
    """The command line with the metadata of another torch in front of the installed one."""
    metadata = tmp_path / "torch-9.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.0\n")
    command = [sys.executable, "-X", "importtime", "-m", "observe_r1", "fit", "--config=quickstart.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 1
    error = finished.stderr[finished.stderr.index("observe-r1 fit:") :]
    for words in (
        "torch 9.0 is installed",
        "needs torch<2.14,>=2.11",
        "pip install 'torch",
        "OBSERVE_R1_ANY_VERSIONS=1",
    ):
        assert words in error
    assert not re.search(r"\| +torch$", finished.stderr, re.MULTILINE)
