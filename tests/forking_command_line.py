"""Runs `observe-r1` many times for one start of the interpreter: a child is forked for every command.

A program of its own, without threads, so that forking is safe. A line of JSON on standard input asks for a command; the
answer is a line of JSON with its exit code. What the command writes goes to the file that the line names.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback

# what nearly every command imports
import observe_r1.callbacks
import observe_r1.cli
import observe_r1.commands
import observe_r1.evaluation
import observe_r1.ladder_builder.build
import observe_r1.lightning_cli


def run(request: dict[str, object]) -> None:
    """In the child: as the console script does it."""
    os.chdir(str(request["directory"]))
    output = os.open(str(request["output"]), os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(request["environment"])  # type: ignore[call-overload]
    signal.alarm(120)
    sys.argv = ["observe-r1", *request["arguments"]]  # type: ignore[misc]
    code = 1
    try:
        observe_r1.cli.main()
        code = 0
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        if isinstance(exit_.code, str):
            print(exit_.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


for line in sys.stdin:
    child = os.fork()
    if not child:
        run(json.loads(line))
    _, status = os.waitpid(child, 0)
    print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)
