"""The shipped build configs, through the parser of the command; and the page that shows how to use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import auto_parser

from observe_r1.ladder_builder.build import SimpleQuestions, build_ladder

ROOT = Path(__file__).parents[2]
STAND_IN = (
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.strategy=auto",
    "--trainer.precision=32-true",
)


def instantiate(name: str, *arguments: str) -> Any:
    """The arguments of `build_ladder`, made by its own parser."""
    parser = auto_parser(build_ladder, as_positional=False)
    given = [f"--config={ROOT / 'configs/ladder' / name}", "--sources=[data]", "--output=out", *STAND_IN, *arguments]
    return parser.instantiate(parser.parse_args(given))


def test_the_paper_values() -> None:
    found = instantiate("build.yaml")
    assert (found.rollouts.sampling.group_size, found.rollouts.sampling.temperature, found.max_samples) == (
        8,
        1.0,
        20_000,
    )
    assert found.mixing == "paper"
    assert found.label_noise.drop == "both"
    assert isinstance(found.simple, SimpleQuestions)
    assert "final answer" in found.simple.instruction


def test_one_source_or_several() -> None:
    assert instantiate("build_quickstart.yaml").sources == [Path("data")]
    assert instantiate("build_quickstart.yaml", "--sources=data/one").sources == Path("data/one")
    assert instantiate("build_quickstart.yaml", "--sources=[one,two]").sources == [Path("one"), Path("two")]


def test_a_matrix_and_an_engine_of_ones_own() -> None:
    matrix = '--mixing={"levels": [0, 1], "stages": [0.5], "shares": [[1, 2]]}'
    engine = "--rollouts.rollout=observe_r1.rollout.HFRollout"
    found = instantiate("build_quickstart.yaml", matrix, engine)
    assert found.mixing.shares == ((1, 2),)
    assert type(found.rollouts.rollout).__name__ == "HFRollout"
