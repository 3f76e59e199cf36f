"""The command line: Lightning's fit, validate, test and predict, and the project's own commands beside them."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

OWN_COMMANDS = ("ladder", "export")
DESCRIPTION = (
    "Train vision-language models with the Observe-R1 recipe. `observe-r1 ladder import` makes a ladder from your own "
    "data (see `observe-r1 ladder --help`), `observe-r1 export` a Hugging Face directory from a "
    "checkpoint; the subcommands below train and evaluate."
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `observe-r1`; `arguments` stand for those of the process."""
    sys.argv[1:] = [locate_config(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
    # class_path finds a reward or callback in a file where the command is started, or beside a config
    configs = [argument.rpartition("=")[2] for argument in sys.argv if argument.endswith(".yaml")]
    sys.path += dict.fromkeys([os.getcwd(), *(str(Path(config).resolve().parent) for config in configs)])
    if sys.argv[1:] and sys.argv[1] in OWN_COMMANDS:
        run_own_command(sys.argv[1], sys.argv[2:])
    else:
        run_lightning_command()


def run_own_command(name: str, arguments: Sequence[str]) -> None:
    """`observe-r1 ladder ...`; imports what the command needs only."""
    from jsonargparse import auto_cli

    command: Any
    if name == "export":
        from observe_r1.export import export_checkpoint as command
    else:
        from observe_r1.ladder.importers import import_ladder

        command = {"import": import_ladder}
    try:
        auto_cli(command, args=list(arguments), prog=f"observe-r1 {name}", as_positional=True)
    except (ValueError, OSError) as error:
        sys.exit(f"observe-r1 {name}: {error}")


def run_lightning_command() -> None:
    """`observe-r1 fit|validate|test|predict`, from `sys.argv`: Lightning starts further ranks with it."""
    # of no use to a user: Lightning's advertisements, its own call of a deprecated torch function, and that the
    # reference model does not train
    notes = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    notes.addFilter(lambda record: "Tip:" not in record.getMessage())
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")

    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    from observe_r1.checkpoint import check_requested
    from observe_r1.datamodules import NeuraLadderDataModule
    from observe_r1.module import ObserveR1

    check_requested(sys.argv)

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


def locate_config(argument: str) -> str:
    """`quickstart.yaml`, also behind `--config=`, is the config in the package unless there is such a file here."""
    option, equals, name = argument.rpartition("=")
    shipped = Path(str(files("observe_r1.configs"))) / name.removeprefix("configs/")
    asked_for = option in ("", "--config", "-c") and name.endswith(".yaml") and not Path(name).exists()
    return f"{option}{equals}{shipped}" if asked_for and shipped.is_file() else argument


if __name__ == "__main__":
    main()
