"""LightningCLI with our module, data module and links."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any, TextIO

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from rich import get_console
from transformers.utils.logging import disable_progress_bar

from observe_r1.argument_errors import ShortErrors
from observe_r1.callbacks.cluster.lost_ranks import LostRanks
from observe_r1.callbacks.cluster.preemption import Preemption
from observe_r1.callbacks.cluster.shared_checkpoints import SharedCheckpoints
from observe_r1.callbacks.display.closing_summary import ClosingSummary
from observe_r1.callbacks.display.progress_bar import progress_display
from observe_r1.callbacks.display.start_panel import StartPanel
from observe_r1.callbacks.health import Health
from observe_r1.callbacks.run_config import RunConfig
from observe_r1.datamodules import NeuraLadderDataModule
from observe_r1.last_checkpoint import find_last
from observe_r1.module import ObserveR1

DESCRIPTION = (
    "Train vision-language models with the Observe-R1 recipe. The subcommands below train and evaluate. Beside them: "
    "`observe-r1 ladder import`, `build` and `inspect` make a ladder from your own data, `audit` tries its answers on "
    "the verification, `plan` says what memory and time a training will take, `serve` starts a vLLM server for a "
    "training, `score` scores saved predictions again, `export` makes a Hugging Face directory from a checkpoint, "
    "`report` shows a run on an HTML page; each has its own --help."
)


# what the start panel says, or nobody needs
UNWANTED = (
    "GPU available: False",
    "TPU available",
    "HPU available",
    "Loading `train_dataloader` to estimate",
    "`Trainer.fit` stopped: `max_",
    "`weights_only` was not set",
)


class Parser(ShortErrors, LightningArgumentParser):
    """Lightning's parser, with short errors."""


class ObserveR1CLI(LightningCLI):
    """Parses the command line and runs its subcommand."""

    def __init__(self, **options: Any) -> None:
        self.shared_checkpoints = SharedCheckpoints()
        super().__init__(
            ObserveR1,
            NeuraLadderDataModule,
            subclass_mode_data=True,
            seed_everything_default=0,
            trainer_defaults={
                "callbacks": [LostRanks(), Preemption(), self.shared_checkpoints],
                "enable_model_summary": False,  # the start panel has more
            },
            save_config_callback=RunConfig,
            save_config_kwargs={"overwrite": True, "save_to_log_dir": False},
            parser_class=Parser,
            parser_kwargs={"description": DESCRIPTION},
            **options,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(Health, "health")
        for target in ("model.seed", "data.init_args.seed"):
            parser.link_arguments("seed_everything", target, compute_fn=int)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """With what a training shows in the terminal, unless the configuration has its own."""
        config = self._get(self.config_init, "trainer", default={})
        own = config.get("callbacks") or []
        has_bar = any(isinstance(callback, ProgressBar) for callback in (own if isinstance(own, list) else [own]))
        shown: list[Callback] = []
        if config.get("enable_progress_bar") is not False and not has_bar:
            shown.append(progress_display(get_console()))
        if self.subcommand == "fit":
            shown += [StartPanel(), ClosingSummary()]
        self.trainer_defaults = {**self.trainer_defaults, "callbacks": [*self.trainer_defaults["callbacks"], *shown]}
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        if self.subcommand != "fit":  # nothing is saved, so it does not matter where
            warnings.filterwarnings("ignore", message="The dirpath has changed")
        options = self.config_init[self.subcommand]
        if options.ckpt_path == "last":
            options.ckpt_path = find_last(self.trainer)
            if options.ckpt_path is None and self.subcommand != "fit":
                raise ValueError("ckpt_path is last, and no run of this experiment has saved anything: name a file.")
            self.config[self.subcommand].ckpt_path = options.ckpt_path  # as config.yaml keeps it
        self.shared_checkpoints.resumed = options.ckpt_path

    before_validate = before_test = before_predict = before_fit


def quiet_lightning() -> None:
    """Leaves out what is of no use to a user."""
    # Lightning's advertisements, its own call of a deprecated torch function, that the reference model does not train,
    # and that our loaders have no batch sampler
    notes = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    notes.addFilter(lambda record: not record.getMessage().startswith(UNWANTED) and "Tip:" not in record.getMessage())
    # to what stderr is now: while a progress bar is drawn, rich puts what is written there above it
    for handler in [*logging.getLogger("lightning.pytorch").handlers]:
        if isinstance(handler, logging.StreamHandler):
            logging.getLogger("lightning.pytorch").removeHandler(handler)
    logging.getLogger("lightning.pytorch").addHandler(CurrentStderr())
    # that a kernel for CPUs is not there, whenever peft is imported
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.stderr.isatty():  # a log has no bars
        disable_progress_bar()
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
    # only a training has one
    warnings.filterwarnings("ignore", message=r"Be aware that when using `ckpt_path`.*\['ClosingSummary'\]")
    # it looks for a state of the loader; ours is that of the data module
    warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")
    warnings.filterwarnings("ignore", message="Couldn't infer the batch indices")


class CurrentStderr(logging.StreamHandler[TextIO]):
    """Writes to `sys.stderr` as it is at that moment."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, stream: TextIO) -> None:
        """What `StreamHandler` was given is not kept."""
