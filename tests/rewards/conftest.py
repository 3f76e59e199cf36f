"""Groups of completions made from texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from observe_r1.answers import Gold
from observe_r1.experience import Completion, EncodedPrompt, Prompt, PromptGroup

MakeGroup = Callable[[Gold, Sequence[str]], PromptGroup]


@pytest.fixture
def make_group() -> MakeGroup:
    """A group for a gold and the texts of its completions; a completion has as many tokens as its text has words."""

    def make(gold: Gold, texts: Sequence[str]) -> PromptGroup:
        prompt = Prompt(id="sample-7", source="made", messages=[], images=[], gold=gold)
        nothing = torch.zeros(0, dtype=torch.long)
        completions = [
            Completion(torch.zeros(len(text.split()), dtype=torch.long), torch.zeros(len(text.split())), text)
            for text in texts
        ]
        return PromptGroup(EncodedPrompt(prompt, nothing, nothing), completions)

    return make
