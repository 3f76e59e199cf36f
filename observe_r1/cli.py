"""The command line: Lightning's fit, validate, test and predict, and the project's own commands beside them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `observe-r1`; `arguments` stand for those of the process."""
    sys.argv[1:] = [locate_config(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
    # class_path finds a reward or callback in a file where the command is started, or beside a config
    configs = [argument.rpartition("=")[2] for argument in sys.argv if argument.endswith(".yaml")]
    sys.path += dict.fromkeys([os.getcwd(), *(str(Path(config).resolve().parent) for config in configs)])
    from observe_r1.commands import COMMANDS

    if sys.argv[1:] and sys.argv[1] in COMMANDS:
        COMMANDS[sys.argv[1]](sys.argv[2:])
    else:
        run_lightning_command()


def run_lightning_command() -> None:
    """`observe-r1 fit|validate|test|predict`, from `sys.argv`: Lightning starts further ranks with it."""
    from observe_r1.checkpoint import check_requested
    from observe_r1.process_lifetime import end_with_launcher

    end_with_launcher()  # before what takes long to import
    from observe_r1.lightning_cli import ObserveR1CLI, quiet_lightning
    from observe_r1.ranks import leave

    quiet_lightning()
    check_requested(sys.argv)
    try:
        ObserveR1CLI()
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
