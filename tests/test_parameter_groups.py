"""Learning rates by name, on the real tiny model."""

from __future__ import annotations

import pytest
import torch

from observe_r1.loading import PolicyOptions, load_policy
from observe_r1.parameter_groups import parameter_groups

RATES = {"*visual.merger*": 3e-5, "*visual*": 1e-6}


def test_the_first_pattern_decides_and_nothing_is_lost() -> None:
    model = load_policy(PolicyOptions("quickstart")).model
    optimizer = torch.optim.AdamW(parameter_groups(model, RATES), lr=2e-4)  # type: ignore[arg-type]
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        expected = 2e-4 if "visual" not in name else 3e-5 if "merger" in name else 1e-6
        assert rates.pop(id(parameter)) == expected, name
    assert not rates


@pytest.mark.parametrize(
    ("rates", "message"), [({"*audio*": 1e-6}, "fits no trained"), ({"*visual*": -1.0}, "at least 0")]
)
def test_wrong_rates_are_refused(rates: dict[str, float], message: str) -> None:
    model = load_policy(PolicyOptions("quickstart")).model
    with pytest.raises(ValueError, match=message):
        parameter_groups(model, rates)


def test_frozen_parameters_are_in_no_group() -> None:
    model = load_policy(PolicyOptions("quickstart", freeze=["*visual*"])).model
    groups = parameter_groups(model, {"*embed*": 1e-5})
    assert all(p.requires_grad for group in groups for p in group["params"])  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"\*visual\*"):
        parameter_groups(model, {"*visual*": 1e-6})
