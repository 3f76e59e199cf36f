"""What a benchmark is: questions, how they are asked, how responses are judged. Configured by `class_path`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from observe_r1.answers import Gold, answer_content, fast_verdict
from observe_r1.evaluation.item import Item, Judgement, Outcome, Verdict

if TYPE_CHECKING:
    from observe_r1.experience import Prompt

STRICT, LENIENT = "strict", "lenient"


class Benchmark(ABC):
    """A fixed set of questions and the way responses to them are judged.

    `judge` must be a pure function of its arguments: saved responses are judged again by `observe-r1 score`, without
    the data set. `items` and `prompt` are called on every rank and have to agree.
    """

    name: str
    """In the names of logged figures, as in `mathvista/accuracy`, and of files."""

    @property
    @abstractmethod
    def items(self) -> Sequence[Item]:
        """All questions, in a fixed order, without their pictures.

        Raises:
            ValueError: There is no such data, or it is not in the published form.
        """

    @abstractmethod
    def prompt(self, position: int) -> Prompt:
        """The question at a position of `items` as it is asked, pictures decoded.

        Raises:
            ValueError: A picture cannot be used.
        """

    def judge(self, item: Item, response: str) -> Verdict:
        """What a response is worth. By default as the accuracy reward judges, without computer algebra."""
        extraction = extract(response)
        answers = [item.answer] if isinstance(item.answer, str) else item.answer
        golds = (Gold(answer, "auto", tuple(item.choices), unit=item.unit) for answer in answers)
        judgement = Judgement.of(any(fast_verdict(gold, extraction) is True for gold in golds), extraction)
        return Verdict(extraction, judgement, judgement)

    def scorings(
        self, items: Sequence[Item], strict: Sequence[Outcome], lenient: Sequence[Outcome]
    ) -> dict[str, list[Outcome]]:
        """The outcomes under every way of scoring that is reported, by its name; the first is `accuracy` in logs."""
        return {STRICT: list(strict), LENIENT: list(lenient)}


def extract(response: str) -> str:
    """The content of the last complete `<answer>` block, the whole response where there is none."""
    content = answer_content(response)
    return response if content is None else content
