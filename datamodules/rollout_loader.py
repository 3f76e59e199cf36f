"""The train loader: asks the module for a rollout per block of prompts and hands out its micro-batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from observe_r1.datamodules.prompt_stream import PromptStream
from observe_r1.experience import EncodedPrompt, Experience, MicroBatch, Sealed, Skipped, StartedRollout
from observe_r1.experience_state import from_state, started_from_state, started_to_state, to_state
from observe_r1.micro_batches import assemble
from observe_r1.module import ObserveR1
from observe_r1.ranks import any_rank

Place = tuple[dict[str, Any], list[StartedRollout]]
"""Where the stream stands, and the rollouts that were drawn before and are not trained on yet."""


class RolloutLoader:
    """A sized iterable of micro-batches, so that Lightning's automatic optimization drives GRPO.

    It has a length because Lightning would otherwise fetch one batch ahead, and with it the next rollout, from a policy
    that the last micro-batch of this one has yet to change. With refills the ladder can end before that length does;
    the epoch then ends with it.

    The state is saved with the data module: where the stream stands and, in the middle of a rollout, the rollout. One
    that is being sampled ahead is waited for and saved too: the weights it is sampled with are gone after a resume.
    Should it have failed, a resumed run draws its prompts again.
    """

    def __init__(
        self,
        module: ObserveR1,
        stream: PromptStream,
        prompts_per_rollout: int,
        origin: Mapping[str, int | str] | None = None,
    ) -> None:
        self.module = module
        self.stream = stream
        self.prompts_per_rollout = prompts_per_rollout
        self.origin = dict(origin or {})  # what positions in the stream refer to
        self.experience: Experience | None = None
        self.ahead: deque[StartedRollout] = deque()  # engines may sample the next rollout during this one
        self.next_micro_batch = 0
        self.handed_out = 0  # micro-batches of this epoch
        self._collecting_from: Place | None = None

    def __len__(self) -> int:
        rollouts = -(-self.stream.size // self.prompts_per_rollout)
        updates = self.module.updates
        per_rollout = updates.steps_per_rollout * updates.epochs_per_rollout
        return rollouts * per_rollout * self.module.trainer.accumulate_grad_batches

    def __iter__(self) -> Iterator[Sealed[MicroBatch]]:
        epoch = self.stream.epoch
        while self.stream.epoch == epoch:
            if self.experience is None:
                # until it is collected, a checkpoint goes back to here: callbacks may save when something raises
                self._collecting_from = self._place()
                self.experience = self.module.collect(self.stream, self.prompts_per_rollout, self.ahead)
                self._collecting_from = None
                if self.experience is None:
                    self._refuse_unusable_ladder()
                    self._next_epoch()
                    return
            size = len(self.experience)
            for number in range(self.next_micro_batch, size):
                assert self.experience is not None
                batch = assemble(self.experience, number)
                # the state has to be right while the generator is suspended: Lightning saves checkpoints there, and
                # never comes back after the last of `len(self)` micro-batches
                self.next_micro_batch = number + 1
                self.handed_out += 1
                is_last = self.next_micro_batch == size
                if is_last:
                    self.experience, self.next_micro_batch = None, 0
                    if self.handed_out == len(self):
                        self._next_epoch()
                yield Sealed(batch)

    def _next_epoch(self) -> None:
        self.stream.next_epoch()
        self.handed_out = 0

    def _place(self) -> Place:
        return self.stream.state_dict(), list(self.ahead)

    # not state_dict and load_state_dict: Lightning would save those of rank 0, and load them on every rank

    def save(self) -> dict[str, Any]:
        """What `restore` needs to continue at the next micro-batch."""
        stream, ahead = self._collecting_from or self._place()
        for number, rollout in enumerate(ahead):
            if any_rank(rollout.has_failed(), self.module.device):  # the run ends where it would train on it
                stream, ahead = dict(rollout.source_state), ahead[:number]
                break
        return {
            "stream": stream,
            "origin": self.origin,
            "next_micro_batch": self.next_micro_batch,
            "handed_out": self.handed_out,
            "experience": None if self.experience is None else to_state(self.experience),
            "ahead": [started_to_state(rollout) for rollout in ahead],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues where `save` was called.

        Raises:
            ValueError: In the middle of an epoch, ladder or order have changed; in the middle of a rollout,
                `accumulate_grad_batches` has, or a sample is gone.
        """
        if state["experience"] is not None:
            saved = len(state["experience"]["steps"][0]["micro_batches"])
            if saved != self.module.trainer.accumulate_grad_batches:
                raise ValueError(
                    f"The checkpoint was saved in the middle of a rollout with accumulate_grad_batches {saved}, and it "
                    f"is now {self.module.trainer.accumulate_grad_batches}: resume with {saved}."
                )
        self._refuse_other_origin(state)
        self._collecting_from = None
        self.stream.load_state_dict(state["stream"])
        self.next_micro_batch = state["next_micro_batch"]
        self.handed_out = state["handed_out"]
        self.experience = None if state["experience"] is None else from_state(state["experience"], self._prompt_at)
        self.ahead = deque(started_from_state(rollout, self._prompt_at) for rollout in state.get("ahead", ()))

    def _refuse_other_origin(self, state: dict[str, Any]) -> None:
        """Positions mean nothing in another ladder or order. At the start of an epoch there are none."""
        if not state["stream"]["position"] and state["experience"] is None and not state.get("ahead"):
            return
        saved = state.get("origin", self.origin)
        changed = [
            f"{name} was {saved[name]} and is {now}"
            for name, now in self.origin.items()
            if name in saved and saved[name] != now
        ]
        if changed:
            raise ValueError(
                f"The checkpoint was saved in the middle of an epoch, and since then {'; '.join(changed)}. Resume with "
                "the ladder and order it was trained on, or export its weights (observe-r1 export … --dtype "
                "float32) and train on from them (model.policy.pretrained)."
            )

    def _prompt_at(self, position: int) -> EncodedPrompt:
        sample = self.stream.encode(position)
        if isinstance(sample, Skipped):
            raise ValueError(
                f"The checkpoint was saved in the middle of a rollout, but its sample {position} can no longer be read "
                f"({sample.reason}: {sample.detail}). Restore the ladder, or resume from an earlier checkpoint."
            )
        return sample

    def _refuse_unusable_ladder(self) -> None:
        if not self.handed_out:
            skipped, examples = self.stream.skipped, self.stream.examples
            reasons = "; ".join(f"{count} × {name} ({examples.get(name, '')})" for name, count in skipped.items())
            raise ValueError(f"No sample of the ladder can be used: {reasons or 'it is empty'}.")
