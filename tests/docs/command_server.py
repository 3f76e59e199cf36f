"""`observe-r1` and `python` without their start-up: forked from one process that has imported everything already.

Started with the path of a socket, it serves; a copy of this file that is called `observe-r1` or `python` passes
arguments, working directory, environment and its three streams to the server and exits as the command does.

The environment says how a command of the documentation is shortened: OBSERVE_R1_DOCS_WITH is added to what trains or
evaluates, and with OBSERVE_R1_DOCS_PARSE every command is parsed and not run.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import shlex
import signal
import socket
import sys
import threading
from pathlib import Path

COMMANDS = ("observe-r1", "python")
TRAINER_COMMANDS = ("fit", "validate", "test", "predict")


def shortened(arguments: list[str]) -> list[str]:
    """The arguments as the environment wants them run."""
    if "OBSERVE_R1_DOCS_PARSE" in os.environ:
        arguments = [argument for argument in arguments if argument != "--print_command"]
        return [*arguments, "--print_config=skip_default"]
    added = shlex.split(os.environ.get("OBSERVE_R1_DOCS_WITH", "")) if arguments[0] in TRAINER_COMMANDS else []
    return [*arguments, *added]


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
    """Forks a process for every connection."""
    for module in ("ladder_builder.build", "lightning_cli", "ladder.inspection", "ladder.importers"):
        importlib.import_module(f"observe_r1.{module}")  # and with them torch, Lightning and transformers
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children: the kernel forgets them
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listener.close()
                return run(connection)
            connection.close()


def run(connection: socket.socket) -> None:
    """One command, in a process that is like a new one but for what is imported."""
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    request = json.loads(connection.makefile().readline())
    threading.Thread(target=end_with_client, args=(connection,), daemon=True).start()
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path.pop(0)  # the folder of this file
    code: object = 1
    try:
        execute(*request["command"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    finally:
        connection.sendall(f"{code}\n".encode())


def end_with_client(connection: socket.socket) -> None:
    """Who kills the client means the command."""
    if not connection.recv(1):
        os.kill(os.getpid(), signal.SIGKILL)


def execute(command: str, *arguments: str) -> None:
    """What the command does, in this process."""
    if command == "python":
        script, *sys.argv = arguments[0], *arguments
        if script == "-":
            exec(compile(sys.stdin.read(), "<stdin>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_path(script, run_name="__main__")
        return
    from observe_r1.cli import main

    sys.argv = [str(Path(sys.executable).with_name(command)), *arguments]  # DDP starts ranks with it
    main()


if __name__ == "__main__":
    if Path(sys.argv[0]).name in COMMANDS:
        sys.exit(ask(Path(sys.argv[0]).name, sys.argv[1:], os.environ["OBSERVE_R1_DOCS_SOCKET"]))
    serve(sys.argv[1])
