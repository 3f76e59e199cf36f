"""Nothing is reported to the makers of the libraries below us."""

from __future__ import annotations

import os

SWITCHES = {
    "DO_NOT_TRACK": "true",  # understood by several of them
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
}


def switch_off() -> None:
    """Tells them so by their environment variables, before they are imported; what is set already stays.

    vLLM has a variable of its own, which is set where vLLM is started.
    """
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
