"""How servers are started and what goes to them, as far as it needs no vLLM."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from observe_r1.collection import FilteringOptions
from observe_r1.encoding import PromptOptions
from observe_r1.loading import PolicyOptions, load_processor
from observe_r1.module import ObserveR1
from observe_r1.objective import ImportanceOptions
from observe_r1.rollout import VLLMServerRollout
from observe_r1.rollout.serving import ServeOptions, server_command
from observe_r1.rollout.vllm_client import VLLMServer
from observe_r1.rollout.weight_files import WeightFiles, check_directory
from observe_r1.rollout.weight_transfer import ServerGroup


def test_other_machines_need_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OBSERVE_R1_SERVER_KEY", raising=False)
    with pytest.raises(ValueError, match=r"serve\.host is 0\.0\.0\.0, .* set OBSERVE_R1_SERVER_KEY"):
        ServeOptions(host="0.0.0.0")
    monkeypatch.setenv("OBSERVE_R1_SERVER_KEY", "secret")
    assert ServeOptions(host="0.0.0.0").host == "0.0.0.0"


def test_the_command_has_the_settings_of_the_training() -> None:
    processor = load_processor("quickstart", PromptOptions(min_pixels=56**2, max_pixels=140**2))
    options = ServeOptions(max_model_len=512, engine_arguments={"max_num_seqs": 32})
    command, environment = server_command(options, "some/model", torch.bfloat16, True, processor)
    assert {"--model=some/model", "--dtype=bfloat16", "--max-model-len=512", "--max-num-seqs=32"} <= set(command)
    assert '--mm-processor-kwargs={"size": {"shortest_edge": 3136, "longest_edge": 19600}}' in command
    assert {"--host=127.0.0.1", "--logprobs-mode=processed_logprobs", "--enable-prefix-caching"} <= set(command)
    assert environment["VLLM_NO_USAGE_STATS"] == "1"


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_serve_without_vllm_names_the_extras(tmp_path: Path, command_line: Any) -> None:
    output = command_line(tmp_path)("serve", "--config=quickstart.yaml", expect=1)
    assert "pip install 'observe-r1[vllm]'" in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"servers": []}, "give at least one address"),
        ({"servers": ["http://a:1", "http://a:1/"], "weight_directory": "x"}, "each only once"),
        ({"servers": ["localhost:8000"]}, r"'localhost:8000' is no address .* use http://host:port"),
        ({"servers": ["http://other:8000"]}, r"hosts beside this one \(other\): set rollout\.weight_directory"),
        ({"servers": ["http://127.0.0.1:8000"], "async_steps": 2}, r"async_steps is 2: use 0 .* or 1"),
        ({"servers": ["http://127.0.0.1:8000"], "requests_per_server": 0}, "requests_per_server is 0"),
        (
            {"servers": ["http://127.0.0.1:8000"], "request_seconds": 0},
            r"request_seconds is 0.* more than 0 for requests",
        ),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VLLMServerRollout(**options)


def test_sampling_ahead_needs_the_correction() -> None:
    engine = VLLMServerRollout(["http://127.0.0.1:8000"], async_steps=1)
    with pytest.raises(ValueError, match=r"importance\.correction is never: set it to auto"):
        ObserveR1(PolicyOptions("quickstart"), rollout=engine, importance=ImportanceOptions(correction="never"))


def test_sampling_ahead_cannot_refill() -> None:
    engine = VLLMServerRollout(["http://127.0.0.1:8000"], async_steps=1)
    with pytest.raises(ValueError, match=r"filtering\.zero_variance is refill: .* keep, or rollout\.async_steps to 0"):
        ObserveR1(PolicyOptions("quickstart"), rollout=engine, filtering=FilteringOptions("refill"))


def test_what_killed_trainings_left_among_the_temporary_files_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for process in (dead.pid, os.getpid()):
        (tmp_path / f"observe-r1-weights-{process}-x").mkdir()
    files = WeightFiles()
    assert sorted(os.listdir(tmp_path)) == sorted([f"observe-r1-weights-{os.getpid()}-x", files.place.name])


@given(
    shapes=st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=3), min_size=1, max_size=12),
    bucket=st.integers(1, 400),
)
def test_weights_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], bucket: int
) -> None:
    weights = {f"w{number}": torch.randn(shape).transpose(0, -1) for number, shape in enumerate(shapes)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("observe_r1.rollout.weight_files.BUCKET_BYTES", bucket)
        files = WeightFiles(str(tmp_path_factory.mktemp("weights")))
        parts = [load_file(file) for file in check_directory(files.write(iter(weights.items()), "v1"))]
    largest = max(4 * weight.numel() for weight in weights.values())
    assert all(sum(4 * w.numel() for w in part.values()) <= max(bucket, largest) for part in parts)
    assert sum(map(len, parts)) == len(weights)
    assert all(torch.equal(weights[name], weight) for part in parts for name, weight in part.items())


def test_a_version_is_whole_or_not_there_and_only_the_last_is_kept(tmp_path: Path) -> None:
    (tmp_path / "old.partial").mkdir()
    (tmp_path / "the user's own").mkdir()
    files = WeightFiles(str(tmp_path))  # what a killed run has left goes
    assert os.listdir(tmp_path) == ["the user's own"]
    one = files.write([("a", torch.ones(2))], "v1")

    def broken() -> Any:
        yield "a", torch.ones(2)
        assert os.listdir(tmp_path / "v2.partial") == []
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        files.write(broken(), "v2")
    assert files.current == one
    two = files.write([("a", torch.zeros(2))], "v3")
    assert one.is_dir()  # until the servers have the next one
    files.keep_only_current()
    assert not one.exists()
    assert two.is_dir()
    (two / "00000.safetensors").unlink()
    with pytest.raises(ValueError, match="has None bytes"):
        check_directory(two)
    with pytest.raises(ValueError, match="a disk that this server shares with the trainer"):
        check_directory(tmp_path / "v9")
    files.remove()
    assert os.listdir(tmp_path) == ["the user's own"]


def test_servers_of_a_transfer_by_nccl_follow_each_other_in_the_group() -> None:
    """The trainer is rank 0; the workers of each server come behind those of the one before."""
    bodies: dict[int, Any] = {}

    async def run() -> None:
        app = web.Application()

        async def note(request: web.Request) -> web.Response:
            bodies[int(request.match_info["server"])] = await request.json()
            return web.json_response({})

        app.router.add_post("/{server}/init_weight_transfer_engine", note)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        address = f"http://127.0.0.1:{runner.addresses[0][1]}"
        async with aiohttp.ClientSession() as session:
            servers = [VLLMServer(f"{address}/{number}", None, session) for number in range(3)]
            group = ServerGroup(servers, [2, 1, 4], asyncio.get_running_loop(), timeout=60.0)
            info = {"rank_offset": 1, "world_size": 8, "master_port": 1234}
            await asyncio.to_thread(group.init_weight_transfer_engine, info)
        await runner.cleanup()

    asyncio.run(run())
    assert {server: body["init_info"]["rank_offset"] for server, body in bodies.items()} == {0: 1, 1: 3, 2: 4}
    assert all(body["init_info"]["world_size"] == 8 for body in bodies.values())
