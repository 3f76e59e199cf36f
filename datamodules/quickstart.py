"""The data module of the quick start: makes its ladder of synthetic pictures before it streams it."""

from __future__ import annotations

from pathlib import Path

from observe_r1.datamodules.neura_ladder import NeuraLadderDataModule
from observe_r1.datamodules.prompt_stream import Order
from observe_r1.ladder.manifest import Manifest


class QuickstartDataModule(NeuraLadderDataModule):
    """Pictures of shapes with questions about them, in shards under `directory`; made once and used again.

    Their difficulty is measured: the policy that comes with the package answers every question eight times.

    Args:
        directory: Where the ladder is, or will be made.
        train_questions: Questions of the ladder.
        held_out_questions: Questions of the validation, about other pictures.
        prompts_per_rollout: Prompts of one rollout, over all ranks.
        order: `ladder` or `random`.
        workers: Processes that read and encode ahead.
        questions_per_batch: Held-out questions answered at the same time.
        seed: Of the random order. The ladder is the same for all seeds.
    """

    def __init__(
        self,
        directory: str = "data/quickstart",
        train_questions: int = 1536,
        held_out_questions: int = 240,
        prompts_per_rollout: int = 16,
        order: Order = "ladder",
        workers: int = 0,
        questions_per_batch: int = 120,
        seed: int = 0,
    ) -> None:
        super().__init__(
            ladder=directory,
            held_out=str(Path(directory) / "held_out"),
            prompts_per_rollout=prompts_per_rollout,
            order=order,
            workers=workers,
            questions_per_batch=questions_per_batch,
            seed=seed,
        )
        self.directory = Path(directory)
        self.train_questions = train_questions
        self.held_out_questions = held_out_questions

    def prepare_data(self) -> None:
        """Makes the ladder, unless it is there.

        Raises:
            ValueError: The directory holds a ladder of another size, or something that is no ladder.
        """
        if not (self.directory / "ladder.json").exists():
            from observe_r1.quickstart.ladder import build_quickstart_ladder

            try:
                build_quickstart_ladder(
                    self.directory, n_train=self.train_questions, n_held_out=self.held_out_questions
                )
            except (OSError, ValueError):  # another node was faster, on a disk that both share
                if not (self.directory / "ladder.json").exists():
                    raise
        found = tuple(Manifest.load(path).samples for path in (self.directory, self.directory / "held_out"))
        if found != (self.train_questions, self.held_out_questions):
            raise ValueError(
                f"{self.directory} holds a ladder of {found[0]} + {found[1]} questions, and the configuration asks for "
                f"{self.train_questions} + {self.held_out_questions}: delete it, or set another data.directory."
            )
