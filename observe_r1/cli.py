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

OWN_COMMANDS = ("ladder", "audit")
DESCRIPTION = (
    "Train vision-language models with the Observe-R1 recipe. `observe-r1 ladder import`, `build` and `inspect` make "
    "a ladder from your own data, `audit` tries its answers on the verification, `serve` starts a vLLM server for a "
    "training (each has its own --help); the subcommands below train and evaluate."
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `observe-r1`; `arguments` stand for those of the process."""
    sys.argv[1:] = [locate_config(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
    # class_path finds a reward or callback in a file where the command is started, or beside a config
    configs = [argument.rpartition("=")[2] for argument in sys.argv if argument.endswith(".yaml")]
    sys.path += dict.fromkeys([os.getcwd(), *(str(Path(config).resolve().parent) for config in configs)])
    if sys.argv[1:2] == ["serve"]:
        run_serve(sys.argv[2:])
    elif sys.argv[1:] and sys.argv[1] in OWN_COMMANDS:
        run_own_command(sys.argv[1], sys.argv[2:])
    else:
        run_lightning_command()


def run_own_command(name: str, arguments: Sequence[str]) -> None:
    """`observe-r1 ladder ...` and `observe-r1 audit ...`; the exit code is that of what the command returns."""
    quiet_lightning()
    from jsonargparse import auto_cli

    # a build is written down in a config; the others take their paths as they come
    positional = list(arguments[:1]) != ["build"]
    command = own_command(name, arguments)
    try:
        result = auto_cli(command, args=list(arguments), prog=f"observe-r1 {name}", as_positional=positional)
    except (ValueError, OSError) as error:
        sys.exit(f"observe-r1 {name}: {error}")
    sys.exit(getattr(result, "exit_code", 0))


def own_command(name: str, arguments: Sequence[str]) -> Any:
    """What a command line runs, or several by name; imports what is needed only."""
    if name == "audit":
        from observe_r1.ladder.audit import audit_ladder

        return audit_ladder
    wanted = arguments[0] if arguments else ""
    commands: dict[str, Any] = {}
    if wanted not in ("build", "inspect"):
        from observe_r1.ladder.importers import import_ladder

        commands["import"] = import_ladder
    if wanted not in ("import", "inspect"):
        from observe_r1.ladder_builder.build import build_ladder

        commands["build"] = build_ladder
    if wanted not in ("import", "build"):
        from observe_r1.ladder.inspection import inspect_ladder

        commands["inspect"] = inspect_ladder
    return commands


def run_serve(arguments: Sequence[str]) -> None:
    """`observe-r1 serve --config ...`: the configs of a training, and how its vLLM server is started."""
    from lightning.pytorch.cli import LightningArgumentParser

    from observe_r1.rollout.serving import ServeOptions
    from observe_r1.serve import serve

    class ServeCLI(_cli_class()):  # type: ignore[misc]
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            super().add_arguments_to_parser(parser)
            parser.add_class_arguments(ServeOptions, "serve")
            parser.add_argument("--print_command", action="store_true", help="Print the command, do not start it.")

        def instantiate_trainer(self, **_: Any) -> None:
            """A server trains nothing."""

    sys.argv[1:] = arguments
    cli = _run_cli(ServeCLI, run=False)
    try:
        serve(cli.model, str(cli.config.trainer.precision), cli.config_init.serve, cli.config.print_command)
    except ValueError as error:
        sys.exit(f"observe-r1 serve: {error}")


def run_lightning_command() -> None:
    """`observe-r1 fit|validate|test|predict`, from `sys.argv`: Lightning starts further ranks with it."""
    from observe_r1.checkpoint import check_requested

    quiet_lightning()
    check_requested(sys.argv)
    _run_cli(_cli_class())


def _cli_class() -> Any:
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    class ObserveR1CLI(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            for target in ("model.seed", "data.init_args.seed"):
                parser.link_arguments("seed_everything", target, compute_fn=int)

    return ObserveR1CLI


def _run_cli(cli: Any, **options: Any) -> Any:
    from observe_r1.datamodules import NeuraLadderDataModule
    from observe_r1.module import ObserveR1

    return cli(
        ObserveR1,
        NeuraLadderDataModule,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"description": DESCRIPTION},
        **options,
    )


def quiet_lightning() -> None:
    """Leaves out what is of no use to a user."""
    # Lightning's advertisements, its own call of a deprecated torch function, that the reference model does not train,
    # and that our loaders have no batch sampler
    notes = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    notes.addFilter(lambda record: "Tip:" not in record.getMessage())
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
    warnings.filterwarnings("ignore", message="Couldn't infer the batch indices")


def locate_config(argument: str) -> str:
    """`quickstart.yaml`, also behind `--config=`, is the config in the package unless there is such a file here."""
    option, equals, name = argument.rpartition("=")
    shipped = Path(str(files("observe_r1.configs"))) / name.removeprefix("configs/")
    asked_for = option in ("", "--config", "-c") and name.endswith(".yaml") and not Path(name).exists()
    return f"{option}{equals}{shipped}" if asked_for and shipped.is_file() else argument


if __name__ == "__main__":
    main()
