"""LightningCLI with our module, data module and links."""

from __future__ import annotations

import logging
import warnings
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from observe_r1.callbacks.lost_ranks import LostRanks
from observe_r1.datamodules import NeuraLadderDataModule
from observe_r1.module import ObserveR1

DESCRIPTION = (
    "Train vision-language models with the Observe-R1 recipe. The subcommands below train and evaluate. Beside them: "
    "`observe-r1 ladder import`, `build` and `inspect` make a ladder from your own data, `audit` tries its answers on "
    "the verification, `plan` says what memory and time a training will take, `serve` starts a vLLM server for a "
    "training, `score` scores saved predictions again, `export` makes a Hugging Face directory from a checkpoint; each "
    "has its own --help."
)


class ObserveR1CLI(LightningCLI):
    """Parses the command line and runs its subcommand."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            ObserveR1,
            NeuraLadderDataModule,
            subclass_mode_data=True,
            seed_everything_default=0,
            trainer_defaults={"callbacks": LostRanks()},
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"description": DESCRIPTION},
            **options,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for target in ("model.seed", "data.init_args.seed"):
            parser.link_arguments("seed_everything", target, compute_fn=int)


def quiet_lightning() -> None:
    """Leaves out what is of no use to a user."""
    # Lightning's advertisements, its own call of a deprecated torch function, that the reference model does not train,
    # and that our loaders have no batch sampler
    notes = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    notes.addFilter(lambda record: "Tip:" not in record.getMessage())
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
    warnings.filterwarnings("ignore", message="Couldn't infer the batch indices")
