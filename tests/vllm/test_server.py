"""vLLM servers: the trainer's distribution before and after transfers, failures, and what a server lets in."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import requests
import torch

from observe_r1.encoding import PromptEncoder
from observe_r1.experience import Completion, EncodedPrompt
from observe_r1.loading import PolicyOptions, load_policy
from observe_r1.policy import Policy
from observe_r1.rollout import HFRollout, SamplingOptions, VLLMServerRollout
from observe_r1.rollout.vllm_client import LOADING, VLLMServer

from .comparison import NEEDS_VLLM, changed, largest_difference, lengthened
from .servers import Server

pytestmark = NEEDS_VLLM

SAMPLING = SamplingOptions(group_size=4, temperature=1.3, max_new_tokens=20)


@pytest.fixture
def policy() -> Policy:
    return load_policy(PolicyOptions("quickstart", gradient_checkpointing=False))


def engine_for(servers: Sequence[Server], policy: Policy, encoder: PromptEncoder, **options: Any) -> VLLMServerRollout:
    engine = VLLMServerRollout([server.url for server in servers], **{"recovery_seconds": 15.0, **options})
    engine.setup(policy, encoder.processor)
    return engine


@pytest.fixture
def engine(servers: list[Server], policy: Policy, encoder: PromptEncoder) -> Iterator[VLLMServerRollout]:
    engine = engine_for(servers, policy, encoder)
    yield engine
    engine.close()


def tokens(groups: Sequence[Sequence[Completion]]) -> list[list[list[int]]]:
    return [[completion.token_ids.tolist() for completion in group] for group in groups]


def test_sampler_logprobs_are_the_trainers_before_and_after_every_weight_has_changed(
    engine: VLLMServerRollout, policy: Policy, prompts: list[EncodedPrompt]
) -> None:
    many = prompts * 3  # prompts for both servers; again from their prefix caches
    before = engine.generate(many, SAMPLING, seed=1)
    assert [len(group) for group in before] == [4] * len(many)
    assert largest_difference(policy, many, before, SAMPLING) < 1e-4
    changed(policy, seed=3)
    engine.update_weights(policy.named_weights(), version=1)
    assert largest_difference(policy, many, before, SAMPLING) > 0.1
    after = engine.generate(many, SAMPLING, seed=1)
    assert largest_difference(policy, many, after, SAMPLING) < 1e-4
    assert tokens(after) == tokens(engine.generate(many, SAMPLING, seed=1)) != tokens(before)


def test_greedy_answers_are_those_of_hugging_face(
    engine: VLLMServerRollout, policy: Policy, encoder: PromptEncoder, prompts: list[EncodedPrompt]
) -> None:
    plain = HFRollout()
    plain.setup(policy, encoder.processor)
    greedy = SamplingOptions(2, 0.0, max_new_tokens=24)
    expected, got = (one.generate(prompts, greedy, seed=0) for one in (plain, engine))
    assert tokens(expected) == tokens(got)
    for one, other in zip(expected, got, strict=True):
        assert [(c.text, c.truncated) for c in one] == [(c.text, c.truncated) for c in other]


def test_vision_tokens_are_never_sampled(
    engine: VLLMServerRollout, policy: Policy, prompts: list[EncodedPrompt]
) -> None:
    """Even by a policy that wants little else: they have the row of its favourite first token, enlarged."""
    sampling = SamplingOptions(16, 1.0, max_new_tokens=24)
    forbidden = torch.tensor(policy.forbidden_token_ids)
    with torch.no_grad():
        favourite = policy.transformer(input_ids=prompts[-2].token_ids[None]).logits[0, -1].argmax()
        head = policy.transformer.get_output_embeddings().weight
        head[forbidden] = 1.5 * head[favourite]
    engine.update_weights(policy.named_weights(), version=1)
    groups = engine.generate(prompts, sampling, seed=0)
    sampled = torch.cat([completion.token_ids for group in groups for completion in group])
    assert not torch.isin(sampled, forbidden).any()
    assert largest_difference(policy, prompts, groups, sampling) < 1e-4


@pytest.mark.parametrize("forgotten", ["/reset_prefix_cache", "/reset_encoder_cache"])
def test_every_cache_has_to_be_reset(
    servers: list[Server],
    policy: Policy,
    encoder: PromptEncoder,
    prompts: list[EncodedPrompt],
    monkeypatch: pytest.MonkeyPatch,
    forgotten: str,
) -> None:
    """Without it the server fails, or serves what the old weights computed. (The third cache holds pixels.)"""
    engine = engine_for(servers[:1], policy, encoder, attempts=1)
    request = VLLMServer._request

    async def forgetful(self: VLLMServer, method: str, path: str, *arguments: Any, **options: Any) -> Any:
        return {"success": True} if path == forgotten else await request(self, method, path, *arguments, **options)

    monkeypatch.setattr(VLLMServer, "_request", forgetful)
    asked = [prompts[0]] if forgotten != "/reset_prefix_cache" else [lengthened(prompts[0])]
    sampling = SamplingOptions(group_size=2, max_new_tokens=16)
    engine.generate(asked, sampling, seed=1)
    changed(policy, seed=1, by=0.2)
    engine.update_weights(policy.named_weights(), version=1)
    try:
        groups = engine.generate(asked, sampling, seed=1)
    except RuntimeError as error:
        assert "answered 500" in str(error)  # noqa: PT017 - some are missed by a failure, some are not
        servers[0].kill()  # the fixture starts it again
    else:
        assert largest_difference(policy, asked, groups, sampling) > 1e-3
    engine.close()


def test_stale_weights_are_an_error(engine: VLLMServerRollout, policy: Policy, prompts: list[EncodedPrompt]) -> None:
    changed(policy, seed=1)
    with pytest.raises(RuntimeError, match=r"add observe_r1\.callbacks\.VLLMWeightSync"):
        engine.generate(prompts, SAMPLING, seed=0)


def test_weights_of_somebody_else_are_an_error(
    engine: VLLMServerRollout, servers: list[Server], prompts: list[EncodedPrompt]
) -> None:
    """Another training that uses the server takes it over in the middle of a rollout."""
    engine._bring_up_to_date = lambda server: _nothing()  # type: ignore[method-assign]
    for server in servers:
        server.post("/update_weight_version", json={"new_version": "theirs"})
    with pytest.raises(RuntimeError, match=r"sampled with weights \['theirs'\].*another training"):
        engine.generate(prompts, SAMPLING, seed=0)


async def _nothing() -> None:
    pass


def test_a_server_that_dies_hands_its_prompts_over_and_catches_up_when_it_is_back(
    engine: VLLMServerRollout,
    servers: list[Server],
    policy: Policy,
    prompts: list[EncodedPrompt],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    many = prompts * 8
    expected = engine.generate(many, SAMPLING, seed=5)
    generate, requested = VLLMServer.generate, []

    async def deadly(self: VLLMServer, *arguments: Any) -> Any:
        requested.append(self.url)
        if requested.count(servers[0].url) == 5 and self.url == servers[0].url:
            servers[0].kill()  # with four prompts on their way
        return await generate(self, *arguments)

    monkeypatch.setattr(VLLMServer, "generate", deadly)
    with pytest.warns(UserWarning, match=f"{servers[0].url}.*go to other servers"):
        got = engine.generate(many, SAMPLING, seed=5)
    monkeypatch.setattr(VLLMServer, "generate", generate)
    assert tokens(got) == tokens(expected)
    changed(policy, seed=1)
    with pytest.warns(UserWarning, match="did not take over the new weights"):
        engine.update_weights(policy.named_weights(), version=1)
    assert largest_difference(policy, prompts, engine.generate(prompts, SAMPLING, seed=1), SAMPLING) < 1e-4
    servers[0].start()
    servers[0].wait()  # with the weights of its directory
    servers[1].kill()
    groups = engine.generate(prompts, SAMPLING, seed=1)
    assert largest_difference(policy, prompts, groups, SAMPLING) < 1e-4
    servers[0].kill()
    with pytest.raises(RuntimeError, match=r"No vLLM server is left .*observe-r1 serve"):
        engine.generate(prompts, SAMPLING, seed=0)


def test_a_damaged_transfer_is_refused_before_a_weight_changes(
    engine: VLLMServerRollout, servers: list[Server], policy: Policy, prompts: list[EncodedPrompt], monkeypatch: Any
) -> None:
    from observe_r1.rollout.weight_files import WeightFiles

    write = WeightFiles.write

    def damaged(self: WeightFiles, *arguments: Any) -> Any:
        directory = write(self, *arguments)
        file = directory / "00000.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        return directory

    changed(policy, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(WeightFiles, "write", damaged)
        with pytest.raises(RuntimeError, match=r"No vLLM server took over .* bytes, and \d+ were written"):
            engine.update_weights(policy.named_weights(), version=1)
    with pytest.raises(RuntimeError, match="broke off"):
        engine.generate(prompts, SAMPLING, seed=0)
    engine.update_weights(policy.named_weights(), version=2)
    assert largest_difference(policy, prompts, engine.generate(prompts, SAMPLING, seed=1), SAMPLING) < 1e-4


def test_a_transfer_that_breaks_off_inside_a_server_leaves_it_silent(
    servers: list[Server], policy: Policy, encoder: PromptEncoder, prompts: list[EncodedPrompt]
) -> None:
    """Its weights are mixed then: it answers nobody, and has to be started again."""
    engine = engine_for(servers[:1], policy, encoder, request_seconds=120.0)
    changed(policy, seed=1)

    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        for number, (name, weight) in enumerate(policy.named_weights()):
            yield name, weight if number < 30 else torch.zeros(3, 3)

    with pytest.raises(RuntimeError, match="No vLLM server took over the new weights"):
        engine.update_weights(broken(), version=1)
    version = requests.get(f"{servers[0].url}/weight_info", headers=_key(servers[0]), timeout=60).json()
    assert version == {"weight_version": LOADING}
    body = {"token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 2}}
    with pytest.raises(requests.ReadTimeout):
        servers[0].post("/inference/v1/generate", json=body, timeout=3)
    with pytest.raises(RuntimeError, match=r"start .* again|Start them again"):
        engine.update_weights(policy.named_weights(), version=2)
    engine.close()
    servers[0].kill()
    servers[0].start()
    servers[0].wait()
    engine = engine_for(servers[:1], policy, encoder)
    assert largest_difference(policy, prompts, engine.generate(prompts, SAMPLING, seed=1), SAMPLING) < 1e-4
    engine.close()


def test_a_trainer_that_is_killed_in_a_transfer_leaves_servers_that_the_next_one_can_use(
    servers: list[Server], policy: Policy, encoder: PromptEncoder, prompts: list[EncodedPrompt]
) -> None:
    engine_for(servers, policy, encoder).close()
    servers[0].post("/pause", params={"mode": "wait", "clear_cache": "false"})  # and then it was killed
    changed(policy, seed=2)
    engine = engine_for(servers, policy, encoder)
    assert largest_difference(policy, prompts * 4, engine.generate(prompts * 4, SAMPLING, 1), SAMPLING) < 1e-4
    engine.close()


def test_requests_are_not_served_while_weights_change(
    engine: VLLMServerRollout, servers: list[Server], prompts: list[EncodedPrompt]
) -> None:
    server = servers[0]
    server.post("/pause", params={"mode": "wait", "clear_cache": "false"})
    body = {"token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 2}}
    with pytest.raises(requests.ReadTimeout):
        server.post("/inference/v1/generate", json=body, timeout=2)
    server.post("/resume")
    assert server.post("/inference/v1/generate", json=body).status_code == 200


def test_nothing_listens_beyond_loopback_and_every_path_asks_for_the_key(servers: list[Server]) -> None:
    server = servers[0]
    assert server.listening_addresses() <= {"127.0.0.1", "::1"}
    assert "127.0.0.1" in server.listening_addresses()
    for path in ("/collective_rpc", "/inference/v1/generate", "/pause", "/update_weight_version", "/v1/models"):
        for key in ("", "wrong"):
            assert server.post(path, key=key, json={}).status_code == 401
    assert requests.get(f"{server.url}/health", timeout=60).status_code == 200


def test_the_wrong_key_is_named(
    servers: list[Server], policy: Policy, encoder: PromptEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OBSERVE_R1_SERVER_KEY", "another")
    with pytest.raises(ValueError, match=r"answered 401.*OBSERVE_R1_SERVER_KEY"):
        engine_for(servers, policy, encoder)


def test_other_pixel_limits_are_refused_before_the_first_rollout(servers: list[Server], policy: Policy) -> None:
    from observe_r1.encoding import PromptOptions
    from observe_r1.loading import load_processor

    other = PromptEncoder(load_processor("quickstart", PromptOptions()), PromptOptions())
    with pytest.raises(ValueError, match=r"was started with image_size .* and this training has"):
        engine_for(servers, policy, other)


def test_prompts_that_do_not_fit_are_refused(engine: VLLMServerRollout, prompts: list[EncodedPrompt]) -> None:
    with pytest.raises(ValueError, match=r"raise --serve\.max_model_len"):
        engine.generate(prompts, SamplingOptions(4, 1.0, max_new_tokens=2000), seed=0)
    with pytest.raises(ValueError, match="after the cut"):
        engine.generate(prompts, SamplingOptions(4, 1.0, top_p=0.9, max_new_tokens=20), seed=0)
    assert engine.generate([], SAMPLING, seed=0) == []


def test_a_missing_server_is_named_with_the_command(policy: Policy, encoder: PromptEncoder) -> None:
    engine = VLLMServerRollout(["http://127.0.0.1:9"], start_seconds=0.5)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"http://127\.0\.0\.1:9 did not answer .*--serve\.port 9"):
        engine.setup(policy, encoder.processor)
    assert time.monotonic() - started < 120  # and not 600


def _key(server: Server) -> dict[str, str]:
    from .servers import KEY

    return {"Authorization": f"Bearer {KEY}"}
