"""`observe-r1` and `python` without their start-up: forked from one process that has imported everything already.

Started with the path of a socket, it serves; a copy of this file that is called `observe-r1` or `python` passes
arguments, working directory, environment and its three streams to the server and exits as the command does.

The environment says how a command of the documentation is shortened: OBSERVE_R1_DOCS_WITH is added to what trains or
evaluates, and with OBSERVE_R1_DOCS_PARSE every command is parsed and not run.
"""

from __future__ import annotations

import atexit
import json
import os
import shlex
import signal
import socket
import sys
import traceback
from typing import NoReturn

COMMANDS = ("observe-r1", "python")
TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
IMPORTED = ("callbacks", "cli", "commands", "evaluation", "ladder.importers", "ladder.inspection_report")
IMPORTED += ("ladder_builder.build", "lightning_cli")  # and with them torch, Lightning and transformers


def shortened(arguments: list[str]) -> list[str]:
    """The arguments as the environment wants them run."""
    if "OBSERVE_R1_DOCS_PARSE" in os.environ:
        arguments = [argument for argument in arguments if argument != "--print_command"]
        return [*arguments, "--print_config=skip_default"]
    trains = bool(arguments) and arguments[0] in TRAINER_COMMANDS
    return [*arguments, *(shlex.split(os.environ.get("OBSERVE_R1_DOCS_WITH", "")) if trains else [])]


def ask(command: str, arguments: list[str], path: str) -> int:
    """The exit code of a command that the server runs with our streams, 137 where it was killed."""
    arguments = shortened(arguments) if command == "observe-r1" else arguments
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        request = {"command": [command, *arguments], "directory": os.getcwd(), "environment": dict(os.environ)}
        socket.send_fds(connection, [b"\0"], [0, 1, 2])
        connection.sendall(json.dumps(request).encode() + b"\n")
        return int(connection.makefile().readline() or 137)


def serve(path: str) -> None:
    """Forks for every connection; comes back in the process that is to run a command, as a new one would begin."""
    from importlib import import_module

    from observe_r1.process_lifetime import end_with_parent

    for module in IMPORTED:
        import_module(f"observe_r1.{module}")
    end_with_parent()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{path}.new")
        listener.listen()
        os.rename(f"{path}.new", path)  # it is there when it can be connected to
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children: the kernel forgets them
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listener.close()
                return fork_command(connection)
            connection.close()


def fork_command(connection: socket.socket) -> None:
    """Comes back in the process of the command. Its parent stays behind and tells the client how it ended."""
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    request = json.loads(connection.makefile().readline())
    child = os.fork()
    if child:
        for stream in streams:
            os.close(stream)
        watch(child, connection)
    connection.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path.pop(0)  # the folder of this file
    sys.argv = request["command"]


def watch(child: int, connection: socket.socket) -> NoReturn:
    """Ends with the command; who kills the client means the command."""
    from threading import Thread

    def end_with_client() -> None:
        if not connection.recv(1):
            os.kill(child, signal.SIGKILL)

    Thread(target=end_with_client, daemon=True).start()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    connection.sendall(f"{code if code >= 0 else 128 - code}\n".encode())
    os._exit(0)


def run() -> NoReturn:
    """The command, and the end of its process without the seconds that Python takes to forget all it has imported."""
    code = 1
    try:
        execute(*sys.argv)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def execute(command: str, *arguments: str) -> None:
    """What the command does, in this process."""
    if command == "python":
        import runpy

        script, *sys.argv = arguments[0], *arguments
        if script == "-":
            exec(compile(sys.stdin.read(), "<stdin>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_path(script, run_name="__main__")
        return
    from observe_r1.cli import main

    sys.argv = [os.path.join(os.path.dirname(sys.executable), command), *arguments]  # DDP starts ranks with it
    main()


if __name__ == "__main__":
    if os.path.basename(sys.argv[0]) in COMMANDS:
        sys.exit(ask(os.path.basename(sys.argv[0]), sys.argv[1:], os.environ["OBSERVE_R1_DOCS_SOCKET"]))
    serve(sys.argv[1])
    run()
