"""What the options of a policy do to the model that is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from observe_r1.loading import PolicyOptions, load_policy, locate

from .test_quantization import question


@pytest.mark.parametrize(("chosen", "text", "vision"), [(True, 2, 2), (False, 1, 1), ("text", 2, 1), ("vision", 1, 2)])
def test_blocks_of_text_and_vision_compute_again_as_they_are_told(chosen: Any, text: int, vision: int) -> None:
    """Counted: how often a block runs in a forward and its backward."""
    model = load_policy(PolicyOptions("quickstart", gradient_checkpointing=chosen)).model
    runs = {"text": 0, "vision": 0}
    towers = {"text": model.model.language_model.layers, "vision": model.model.visual.blocks}
    for name, blocks in towers.items():

        def count(*_: Any, name: str = name) -> None:
            runs[name] += 1

        for block in blocks:
            block.mlp.register_forward_pre_hook(count)
    model(**question(locate("quickstart"))).logits.sum().backward()
    assert runs == {"text": text * len(towers["text"]), "vision": vision * len(towers["vision"])}


def test_other_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="'both': use true, false, text or vision"):
        PolicyOptions("quickstart", gradient_checkpointing="both")  # type: ignore[arg-type]
