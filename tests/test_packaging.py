"""What is installed is what is in the tree."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = {"observe_r1": "observe_r1", "callbacks": "observe_r1/callbacks", "datamodules": "observe_r1/datamodules"}


def installed_name(file: Path) -> str:
    """Where a file of the tree lies in the wheel."""
    top, *rest = file.relative_to(ROOT).parts
    return "/".join(({**SOURCES, "configs": "observe_r1/configs"}[top], *rest))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(directory), str(ROOT)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (path,) = directory.glob("*.whl")
    return zipfile.ZipFile(path).namelist()


@pytest.mark.slow
def test_the_wheel_holds_every_module_config_and_the_tiny_policy(wheel: list[str]) -> None:
    modules = [file for top in (*SOURCES, "configs") for file in (ROOT / top).rglob("*.py")]
    data = [*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "observe_r1/quickstart/policy").iterdir()]
    data += (ROOT / "observe_r1/run_report").glob("report.*")
    expected = {installed_name(file) for file in (*modules, *data)} | {"observe_r1/py.typed"}
    assert len(expected) > 50
    assert expected <= set(wheel)


@pytest.mark.slow
def test_the_wheel_holds_nothing_else(wheel: list[str]) -> None:
    """Top-level packages named `callbacks` or `tests` would pollute site-packages."""
    assert {name.split("/")[0].partition("-")[0] for name in wheel} == {"observe_r1"}


def test_packages_are_the_folders() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {file.parent for top in (*SOURCES, "configs") for file in (ROOT / top).rglob("*.py")}
    folders |= {file.parent for file in (ROOT / "configs").rglob("*.yaml")} | {ROOT / "observe_r1/quickstart/policy"}
    assert sorted(settings["packages"]) == sorted(installed_name(folder).replace("/", ".") for folder in folders)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, observe_r1; print(sorted({'torch', 'lightning', 'transformers', 'numpy'} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


@pytest.mark.parametrize("first", ["torchvision", "torchmetrics", "transformers.models.qwen2_5_vl"])
def test_torchvision_imports_beside_this_torch(first: str) -> None:
    code = f"import observe_r1, {first}, torchvision, torchvision.transforms.v2; print(torchvision.__spec__.loader)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert output.returncode == 0, output.stderr
    assert "SourceFileLoader" in output.stdout


@pytest.mark.parametrize("name", ["torchaudio", "torchcodec"])
def test_a_wheel_that_cannot_load_its_library_fails_when_it_is_used(name: str, tmp_path: Path) -> None:
    """In a child process that imports nothing of ours, too; the sitecustomize of the environment still runs."""
    for package, text in ((name, "raise OSError('libcudart.so.13: cannot open')"), ("other", "")):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(text)
    (tmp_path / name / "part.py").write_text("")
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.own = True")
    code = (
        f"import sys, {name}\ntry:\n    import {name}.part\nexcept ModuleNotFoundError:\n    print(sys.own)\n"
        f"print(hasattr({name}, 'load'))\n{name}.load"
    )
    path = os.pathsep.join([str(ROOT / "observe_r1/child_process"), str(tmp_path)])
    output = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert output.stdout.split() == ["True", "False"]
    assert "built for another torch than the one installed: libcudart.so.13: cannot open" in output.stderr


def test_the_module_and_the_script_are_the_same_command() -> None:
    as_module = subprocess.run(
        [sys.executable, "-m", "observe_r1", "--help"], capture_output=True, text=True, check=True
    )
    script = Path(sys.executable).parent / "observe-r1"
    as_script = subprocess.run([str(script), "--help"], capture_output=True, text=True, check=True)
    assert as_script.stdout == as_module.stdout.replace("__main__.py", "observe-r1")
