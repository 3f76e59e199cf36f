"""What the command line says about a wrong argument: the value, what may stand there, and the nearest right name."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

NEAR = 0.6  # similarity from which difflib takes a name for a slip of another
MANY = 16  # names that a message lists at most

# where the classes of a setting are found by name
CLASSES = {
    "trainer.logger": ("lightning.pytorch.loggers",),
    "trainer.callbacks": ("observe_r1.callbacks", "lightning.pytorch.callbacks"),
    "trainer.strategy": ("observe_r1.strategies", "lightning.pytorch.strategies"),
    "model.rewards": ("observe_r1.rewards",),
    "model.rollout": ("observe_r1.rollout",),
    "model.optimizer": ("torch.optim",),
    "model.scheduler": ("observe_r1.schedules",),
    "data": ("observe_r1.datamodules",),
}

_ALTERNATIVES = re.compile(r"(Does not validate against|Subtypes:|Errors:|Given value type:)")
_EXPECTED = re.compile(r"- Expected (?!an instantiatable)")
_REQUIRED = re.compile(r"the following arguments are required: (.+)")


class ShortErrors(ArgumentParser):
    """A parser whose errors are a paragraph, without the list of all options before it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints what is wrong and ends with exit code 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        program = parser.prog.replace(" [options]", "")
        lines = [f"{program}: error: {readable(message)}", *advice(message, parser)]
        sys.stderr.write("\n".join(lines) + f"\nAll options: {program} --help\n")
        self.exit(2)


def readable(message: str) -> str:
    """A message of jsonargparse without its internals: one line for each thing that is wrong."""
    given = re.search(r"Given value: (.*)", message)
    value = re.sub(r"^NestedArg\(.*val=(.*)\)$", r"\1", given[1]) if given else ""
    head: list[str] = []
    tried: list[str] = []
    for line in message.splitlines():
        text = line.strip()
        if _ALTERNATIVES.match(text.removeprefix("- ")) or text.startswith("Given value:"):
            continue
        if text.startswith("- "):
            tried.append(text)
        elif tried:
            tried[-1] += " " + text
        else:
            head.append(text)
    reasons = list(dict.fromkeys(text[2:] for text in tried if not _EXPECTED.match(text)))
    if tried and not reasons:
        expected = dict.fromkeys(text.removeprefix("- Expected ").removeprefix("a ") for text in tried)
        reasons = [f"Expected {' or '.join(expected)}. Got value: {value}"]
    return _plain_types(" ".join([*head, "; ".join(reasons)]).strip())


def advice(message: str, parser: ArgumentParser) -> Iterator[str]:
    """What may stand there instead."""
    options = [action.dest for action in parser._actions]
    wrong = re.search(r"does not accept option '([\w.]+)'|unrecognized arguments: --([\w.]+)", message)
    if wrong:
        yield from _other_options(wrong[1] or wrong[2], options)
    key = re.search(r'Parser key "([\w.]+)"', message)
    for class_path, option in _unique(re.findall(r"class_path '([\w.]+)':\s+Option '([\w.]+)' is not", message)):
        setting = key[1] if key else ""
        others = [other for other in _classes(CLASSES.get(setting, ())) if option in _parameters(other)]
        if others and setting == "data":  # where one class stands for another
            yield f"{others[0]} takes it: put --{setting}.class_path {others[0]} before it."
        yield from _near(option, _parameters(class_path), f"{class_path} takes")
    for module, name in _unique(re.findall(r"module '([\w.]+)' has no attribute '(\w+)'", message)):
        yield from _near(name, _classes((module,)), f"{module} has")
    for name in _unique(re.findall(r"Expected a dot import path string: (\w+)", message)):
        places = CLASSES.get(key[1], ()) if key else ()
        yield from _near(name, _classes(places), "Classes are named by their full path:")
    for module in _unique(re.findall(r"No module named '([\w.]+)'", message)):
        yield f"Modules are looked for in {os.getcwd()}, beside the configs, and among the installed packages."
        yield f"Put {module.partition('.')[0]}.py there, or install the package it comes from."
    for class_path in _unique(re.findall(r"but ([\w.]+) is abstract", message)):
        missing = getattr(_imported(class_path), "__abstractmethods__", ())
        yield f"{class_path} lacks {_listed(sorted(missing))}."
    if re.search(r"Expected a <class 'list'>", message):
        yield "A list is written as [first, second], also where it has one entry."
    if "Problems parsing config" in message:
        yield from _unreadable_configs()
    missing_file = re.search(r"File does not exist: '(.*)'", message)
    if missing_file and key and key[1] == "config":
        yield from _near(Path(missing_file[1]).name, _shipped_configs(), "Shipped configs:")
    bare_config = re.search(r"unrecognized arguments: ([^-]\S*\.ya?ml)\b", message)
    if bare_config:
        # the command line has put the place of a shipped one before its name
        given = bare_config[1].removeprefix(f"{_config_folder()}{os.sep}")
        yield f"A config stands behind --config: --config {given}"
    required = _REQUIRED.search(message)
    if required and "policy.pretrained" in required[1]:
        config = "ladder/build.yaml" if "rollouts.policy" in required[1] else "quickstart.yaml"
        yield f"A config gives all that is required, such as --config {config}."
    elif required:
        names = required[1].split(", ")
        yield f"Give {' and '.join(f'--{key[1]}.{name}' if key else name for name in names)}."


def _other_options(name: str, options: Sequence[str]) -> Iterator[str]:
    """Options near a wrong one, or those that stand beside it."""
    yield from _near(name, options, "")
    if not _close(name, options):
        parents = (name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1))
        parent = next((p for p in parents if any(option.startswith(f"{p}.") for option in options)), "")
        start = f"{parent}." if parent else ""
        beside = {option.removeprefix(start).partition(".")[0] for option in options if option.startswith(start)}
        yield f"{parent or 'The command'} takes {_listed(sorted(beside - {'help'}))}."


def _near(name: str, known: Sequence[str], otherwise: str) -> Iterator[str]:
    close = _close(name, known)
    if close:
        yield f"Did you mean {close[0]}?"
    elif otherwise and known:
        yield f"{otherwise} {_listed(known)}."


def _close(name: str, known: Iterable[str]) -> list[str]:
    """Names like this one, compared as a whole, or by their last part for full paths of classes."""
    by_last = {option.rpartition(".")[2]: option for option in known}
    if "." in name:
        return difflib.get_close_matches(name, list(known), 1, NEAR + 0.2)
    return [by_last[last] for last in difflib.get_close_matches(name, by_last, 1, NEAR)]


def _classes(modules: Iterable[str]) -> list[str]:
    """Full paths of the public classes of modules."""
    found = []
    for name in modules:
        module = importlib.import_module(name)
        public = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
        found += [f"{name}.{public_name}" for public_name in public if inspect.isclass(getattr(module, public_name))]
    return found


def _parameters(class_path: str) -> list[str]:
    names: dict[str, None] = {}
    for part in getattr(_imported(class_path), "__mro__", ()):
        parameters = inspect.signature(part.__init__).parameters.values() if "__init__" in vars(part) else ()
        names |= dict.fromkeys(p.name for p in parameters if p.kind is not p.VAR_POSITIONAL and p.name != "self")
        if not any(p.kind is p.VAR_KEYWORD for p in parameters) and parameters:
            break
    return [name for name in names if name not in ("kwargs", "options")]


def _imported(class_path: str) -> Any:
    module, _, name = class_path.rpartition(".")
    return getattr(importlib.import_module(module), name, None)


def _unreadable_configs() -> Iterator[str]:
    import yaml

    for argument in sys.argv:
        path = Path(argument.rpartition("=")[2])
        if path.suffix in (".yaml", ".yml") and path.is_file():
            try:
                yaml.safe_load(path.read_text())
            except yaml.YAMLError:
                yield f"The file is {path}; indentation and brackets are what is usually wrong."


def _config_folder() -> Path:
    import observe_r1.configs

    return Path(observe_r1.configs.__path__[0])


def _shipped_configs() -> list[str]:
    folder = _config_folder()
    names = (path.relative_to(folder) for path in folder.rglob("*.yaml"))
    return [str(name) for name in sorted(names, key=lambda name: (len(name.parts), name))]  # experiments, then overlays


def _plain_types(text: str) -> str:
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text).replace("NoneType", "null")
    text = re.sub(r"\ba (?=int\b)", "an ", text)
    text = re.sub(r"(?:\ba )?typing\.Literal\[([^\]]*)\]", r"one of \1", text)
    return re.sub(r'Parser key "([\w.]+)":', r"\1:", text)


def _listed(names: Sequence[str]) -> str:
    return ", ".join([*names[:MANY], *(["…"] if len(names) > MANY else [])])


def _unique(found: Sequence[Any]) -> list[Any]:
    return list(dict.fromkeys(found))
