"""The command line: Lightning's fit, validate, test and predict, and the project's own commands beside them."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from observe_r1 import __version__
from observe_r1.telemetry import switch_off

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `observe-r1`; `arguments` stand for those of the process."""
    switch_off()
    sys.argv[1:] = [locate_config(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
    # class_path finds a reward or callback in a file where the command is started, or beside a config
    configs = [argument.rpartition("=")[2] for argument in sys.argv if argument.endswith(".yaml")]
    sys.path += dict.fromkeys([os.getcwd(), *(str(Path(config).resolve().parent) for config in configs)])
    from observe_r1.commands import COMMANDS
    from observe_r1.error_reports import reported
    from observe_r1.requirements import check_versions

    command = sys.argv[1] if sys.argv[1:] and not sys.argv[1].startswith("-") else ""
    with reported(f"observe-r1 {command}".rstrip()):
        if sys.argv[1:] == ["--version"]:
            print(f"observe-r1 {__version__}")
            return
        check_known(command if sys.argv[1:] else None, (*TRAINER_COMMANDS, *COMMANDS))
        check_versions()
        if command in COMMANDS:
            COMMANDS[command](sys.argv[2:])
        else:
            run_lightning_command()


def check_known(command: str | None, known: Sequence[str]) -> None:
    """Raises ValueError for none, or one that there is not; parsing would take seconds of imports to say so."""
    if command is None:
        raise ValueError(f"name a command: {', '.join(known)}. To begin: observe-r1 fit --config quickstart.yaml")
    if command and command not in known:
        near = difflib.get_close_matches(command, known, 1)
        meant = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"there is no command {command!r}.{meant} Commands: {', '.join(known)}.")


def run_lightning_command() -> None:
    """`observe-r1 fit|validate|test|predict`, from `sys.argv`: Lightning starts further ranks with it."""
    os.environ.setdefault("TQDM_LEAVE", "")  # before tqdm is imported: bars such as of weights go when they are done
    from observe_r1.checkpoint import check_requested
    from observe_r1.process_lifetime import end_with_launcher, is_started_by_rank

    end_with_launcher()  # before what takes long to import
    from observe_r1.callbacks.health import SickRun
    from observe_r1.lightning_cli import ObserveR1CLI, quiet_lightning
    from observe_r1.ranks import leave, over_ranks

    quiet_lightning()
    check_requested(sys.argv)
    try:
        ObserveR1CLI()
    except SickRun as sick:
        print(f"observe-r1: stopped. {sick}", file=sys.stderr, flush=True)
        over_ranks(None)  # waits: a rank that ends first with an error has Lightning kill the others
        leave()
        sys.exit(0 if is_started_by_rank() else 1)
    except SystemExit:
        leave()
        raise
    leave()  # after an error other ranks may be waiting, and gloo would wait for them


def locate_config(argument: str) -> str:
    """`quickstart.yaml`, also behind `--config=`, is the config in the package unless there is such a file here."""
    option, equals, name = argument.rpartition("=")
    shipped = Path(str(files("observe_r1.configs"))) / name.removeprefix("configs/")
    asked_for = option in ("", "--config", "-c") and name.endswith(".yaml") and not Path(name).exists()
    return f"{option}{equals}{shipped}" if asked_for and shipped.is_file() else argument


if __name__ == "__main__":
    main()
