"""The commands beside Lightning's own. Each imports what it needs when it is called."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any


def ladder(arguments: Sequence[str]) -> None:
    """`observe-r1 ladder import|build|inspect`."""
    wanted = arguments[0] if arguments else ""
    several = wanted not in ("import", "build", "inspect")  # for their help
    commands: dict[str, Any] = {}
    if several or wanted == "import":
        from observe_r1.ladder.importers import import_ladder

        commands["import"] = import_ladder
    if several or wanted == "build":
        from observe_r1.ladder_builder.build import build_ladder
        from observe_r1.lightning_cli import quiet_lightning

        quiet_lightning()
        commands["build"] = build_ladder
    if several or wanted == "inspect":
        from observe_r1.ladder.inspection_report import inspect_ladder

        commands["inspect"] = inspect_ladder
    # a build is written down in a config; the others take their paths as they come
    _run("ladder", commands, arguments, as_positional=wanted != "build")


def audit(arguments: Sequence[str]) -> None:
    """`observe-r1 audit LADDER`."""
    from observe_r1.ladder.audit import audit_ladder

    _run("audit", audit_ladder, arguments)


def score(arguments: Sequence[str]) -> None:
    """`observe-r1 score PREDICTIONS`."""
    from observe_r1.evaluation.score import score_predictions

    _run("score", score_predictions, arguments)


def export(arguments: Sequence[str]) -> None:
    """`observe-r1 export CHECKPOINT OUTPUT`."""
    from observe_r1.export import export_checkpoint
    from observe_r1.lightning_cli import quiet_lightning

    quiet_lightning()  # no bars in logs
    _run("export", export_checkpoint, arguments)


def report(arguments: Sequence[str]) -> None:
    """`observe-r1 report RUN_DIR`."""
    from observe_r1.run_report.report import report_run

    _run("report", report_run, arguments)


def serve(arguments: Sequence[str]) -> None:
    """`observe-r1 serve --config ...`: the configs of a training, and how its vLLM server is started."""
    from observe_r1.serve import ServeCLI, serve

    sys.argv[1:] = arguments
    cli = ServeCLI(run=False)
    serve(cli.model, str(cli.config.trainer.precision), cli.config_init.serve, cli.config.print_command)


def plan(arguments: Sequence[str]) -> None:
    """`observe-r1 plan --config ...`: memory and time of a training; exit code 1 where it does not fit, 2 on errors."""
    from observe_r1.lightning_cli import quiet_lightning
    from observe_r1.plan import PlanCLI, plan

    quiet_lightning()
    sys.argv[1:] = arguments
    cli = PlanCLI(run=False)
    try:
        made = plan(cli.model, cli.datamodule, cli.trainer_options, cli.config_init.plan)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"observe-r1 plan: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(made.exit_code)


def _run(name: str, command: Any, arguments: Sequence[str], as_positional: bool = True) -> None:
    """Runs what the arguments ask for; the exit code is that of its result, 0 where it has none."""
    from jsonargparse import auto_cli

    from observe_r1.argument_errors import ShortErrors

    result = auto_cli(
        command,
        args=list(arguments),
        prog=f"observe-r1 {name}",
        as_positional=as_positional,
        parser_class=ShortErrors,
    )
    sys.exit(getattr(result, "exit_code", 0))


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "ladder": ladder,
    "audit": audit,
    "score": score,
    "export": export,
    "report": report,
    "serve": serve,
    "plan": plan,
}
