"""The command line: Lightning's fit, validate, test and predict, and the project's own commands beside them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OWN_COMMANDS: dict[str, str] = {"ladder": "build and import ladders (observe-r1 ladder --help)"}

DESCRIPTION = "Train vision-language models with the Observe-R1 recipe. Beside the subcommands below: " + "; ".join(
    f"{name}: {purpose}" for name, purpose in OWN_COMMANDS.items()
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `observe-r1`."""
    if arguments is not None:
        sys.argv[1:] = arguments
    arguments = sys.argv[1:]
    sys.path.append(os.getcwd())  # class_path finds a reward or callback in a file beside the config
    if arguments and arguments[0] in OWN_COMMANDS:
        _own_command(arguments[0], arguments[1:])
    else:
        sys.argv[1:] = _with_shipped_configs(arguments)  # Lightning reads it, and starts further ranks with it
        _lightning_command()


def _own_command(name: str, arguments: Sequence[str]) -> None:
    from jsonargparse import auto_cli

    from observe_r1.ladder.importers import import_ladder

    commands: dict[str, dict[str, Any]] = {"ladder": {"import": import_ladder}}
    auto_cli(commands[name], args=list(arguments), prog=f"observe-r1 {name}", as_positional=True)


def _lightning_command() -> None:
    import logging
    import warnings

    # of no use to a user: Lightning's own call of a deprecated torch function, and its advertisements
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*is deprecated", category=FutureWarning)

    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    from observe_r1.datamodules import NeuraLadderDataModule
    from observe_r1.module import ObserveR1

    class ObserveR1CLI(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            for target in ("model.seed", "data.init_args.seed"):
                parser.link_arguments("seed_everything", target, compute_fn=int)

    ObserveR1CLI(
        ObserveR1,
        NeuraLadderDataModule,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"description": DESCRIPTION},
    )


def _with_shipped_configs(arguments: Sequence[str]) -> list[str]:
    """`--config quickstart.yaml` finds the config of that name in the installed package, from any directory."""
    from importlib.resources import files

    shipped = Path(str(files("observe_r1.configs")))
    resolved = list(arguments)
    for number, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option not in ("--config", "-c") or (not equals and number + 1 == len(arguments)):
            continue
        name = value if equals else arguments[number + 1]
        inside = shipped / name.removeprefix("configs/")
        if not Path(name).exists() and inside.is_file():
            resolved[number + (0 if equals else 1)] = f"{option}={inside}" if equals else str(inside)
    return resolved


if __name__ == "__main__":
    main()
