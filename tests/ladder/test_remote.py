"""Ladders behind URLs: the same samples, no byte too many, and servers that fail, hang and change their mind."""

from __future__ import annotations

import fcntl
import json
import logging
import multiprocessing
import shutil
import time
from contextlib import suppress
from pathlib import Path

import fsspec
import pytest
from torch.utils.data import DataLoader, SequentialSampler

from observe_r1.experience import Prompt, Skipped
from observe_r1.ladder.index import index_path, open_index
from observe_r1.ladder.reader import LadderDataset
from observe_r1.ladder.shard_cache import ShardCache
from observe_r1.ladder.shards import write_ladder
from observe_r1.ladder.storage import Files, RemoteOptions, Unreachable

QUICK = {"attempts": 3, "backoff": 0.01}


@pytest.fixture
def ladder(tmp_path, make_sample):
    """Nine samples in three shards."""
    directory = tmp_path / "ladder"
    write_ladder((make_sample(n, n % 3, difficulty=n / 8) for n in range(9)), directory, samples_per_shard=3)
    return directory


@pytest.fixture
def url(ladder, range_server):
    return f"{range_server.url}/ladder"


def ids(dataset):
    return [getattr(sample, "id", getattr(sample, "reason", None)) for sample in dataset]


ALL = [f"geo.3k-{number}" for number in range(9)]


class TestAddresses:
    def test_a_ladder_a_folder_a_glob_and_one_tar(self, ladder, url):
        assert ids(LadderDataset(url)) == ALL
        assert ids(LadderDataset(f"{url}/shard-000001.tar")) == ALL[3:6]
        (ladder / "ladder.json").unlink()
        assert ids(LadderDataset(url)) == ALL
        assert ids(LadderDataset(f"{url}/*2.tar")) == ALL[6:]
        assert ids(LadderDataset([f"{url}/shard-000002.tar", ladder / "shard-000000.tar"])) == ALL[6:] + ALL[:3]

    def test_any_fsspec_url(self, ladder):
        memory = fsspec.filesystem("memory")
        memory.put(str(ladder), "/somewhere", recursive=True)
        try:
            assert ids(LadderDataset("memory://somewhere")) == ALL
            assert ids(LadderDataset("memory://somewhere/*0.tar")) == ALL[:3]
            assert ids(LadderDataset(f"file://{ladder}")) == ALL
        finally:
            memory.rm("/somewhere", recursive=True)

    def test_nothing_there(self, range_server):
        with pytest.raises(ValueError, match="holds no shards"):
            LadderDataset(f"{range_server.url}/nowhere")
        with pytest.raises(ValueError, match=r"no\.tar is missing; restore the file"):
            LadderDataset(f"{range_server.url}/no.tar")

    def test_a_manifest_cannot_name_files_elsewhere(self, ladder):
        manifest = ladder / "ladder.json"
        content = manifest.read_text()
        for elsewhere in ("../x.tar", "/etc/x.tar", "http://elsewhere/x.tar"):
            manifest.write_text(content.replace("shard-000000.tar", elsewhere))
            with pytest.raises(ValueError, match="lies outside of the ladder's directory"):
                LadderDataset(ladder)

    @pytest.mark.parametrize(("workers", "context"), [(1, "fork"), (2, "fork"), (2, "spawn")])
    def test_workers(self, url, workers, context):
        dataset = LadderDataset(url)
        dataset[0]  # a connection of the parent must not reach its workers
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=SequentialSampler(dataset),
            num_workers=workers,
            multiprocessing_context=context,
            timeout=300,
        )
        assert ids(loader) == ALL


class TestBytes:
    def test_a_sample_costs_its_own_bytes(self, url, ladder, range_server):
        dataset = LadderDataset(url)
        range_server.bytes_sent.clear()
        spans = [span for shard in sorted(ladder.glob("*.tar")) for span in open_index(shard).spans]
        for position in (7, 8):
            assert isinstance(dataset[position], Prompt)
        assert range_server.bytes_sent == {"shard-000002.tar": spans[7].length + spans[8].length}

    def test_opening_reads_indexes_and_headers_only(self, url, range_server):
        LadderDataset(url)
        tars = {name: sent for name, sent in range_server.bytes_sent.items() if name.endswith(".tar")}
        assert tars == {f"shard-00000{number}.tar": 2 * 512 for number in range(3)}

    def test_without_an_index_the_shard_is_read_once(self, url, ladder, range_server, tmp_path, caplog):
        for shard in ladder.glob("*.idx"):
            shard.unlink()
        remote = RemoteOptions(cache_directory=str(tmp_path / "cache"))
        with caplog.at_level(logging.WARNING):
            assert ids(LadderDataset(url, remote=remote)) == ALL
        assert "has no index beside it" in caplog.text
        sizes = {shard.name: shard.stat().st_size for shard in ladder.glob("*.tar")}
        sent = dict(range_server.bytes_sent)
        for name, size in sizes.items():
            assert sent[name] <= 2 * size + 2 * 512  # once for the index, once into the cache
        LadderDataset(url, remote=remote)
        for name in sizes:
            assert range_server.bytes_sent[name] == sent[name] + 2 * 512


class TestFaults:
    @pytest.mark.parametrize("status", [500, 503, 429])
    def test_a_server_that_recovers_loses_nothing(self, url, range_server, status):
        dataset = LadderDataset(url, remote=RemoteOptions(**QUICK))
        range_server.fails(status, times=2)
        assert isinstance(dataset[4], Prompt)

    def test_one_that_wakes_up_loses_nothing(self, url, range_server):
        dataset = LadderDataset(url, remote=RemoteOptions(timeout=0.4, attempts=12, backoff=0.01))  # a slow machine
        range_server.fails(0, times=2)
        assert isinstance(dataset[4], Prompt)

    @pytest.mark.parametrize(("status", "requests", "fault"), [(500, 3, "3 times.*500"), (403, 1, "could not.*403")])
    def test_one_that_does_not_is_named_and_bounded(self, url, range_server, status, requests, fault):
        skipping = LadderDataset(url, missing_shards="skip", remote=RemoteOptions(**QUICK))
        strict = LadderDataset(url, remote=RemoteOptions(**QUICK))
        range_server.fails(status, file=".tar")
        range_server.requests.clear()
        skipped = skipping[4]
        assert sum(range_server.requests.values()) == requests
        assert (skipped.position, skipped.reason) == (4, "shard_unreachable")
        with pytest.raises(Unreachable, match=fault):
            strict[4]

    def test_one_that_hangs_is_named_and_bounded(self, url, range_server):
        range_server.fails(0)  # from the first request on, so that no answer has to be quick
        with pytest.raises(Unreachable, match=r"3 times.*no answer in 0\.4 s"):
            Files(RemoteOptions(timeout=0.4, **QUICK)).read(f"{url}/shard-000001.tar", 0, 512)

    def test_a_shard_that_cannot_be_reached_at_the_start(self, url, range_server):
        range_server.fails(500, file="shard-000001.tar")
        with pytest.raises(ValueError, match=r"shard-000001\.tar.*500.*set missing_shards to skip"):
            LadderDataset(url, remote=RemoteOptions(**QUICK))
        dataset = LadderDataset(url, missing_shards="skip", remote=RemoteOptions(**QUICK))
        assert dataset.problems == {"shard_unreachable": 1}
        assert ids(dataset) == ALL[:3] + ["shard_unreachable"] * 3 + ALL[6:]

    def test_a_shard_that_disappears_or_shrinks(self, url, ladder):
        dataset = LadderDataset(url, missing_shards="skip", remote=RemoteOptions(**QUICK))
        (ladder / "shard-000000.tar").unlink()
        (ladder / "shard-000001.tar").write_bytes((ladder / "shard-000001.tar").read_bytes()[:600])
        (ladder / "shard-000002.tar").write_bytes(b"")
        assert ids(dataset) == ["shard_missing"] * 3 + ["shard_truncated"] * 6

    def test_a_shard_that_is_replaced_by_one_of_the_same_size(self, url, ladder, tmp_path, make_sample):
        dataset = LadderDataset(url, remote=RemoteOptions(**QUICK))
        write_ladder((make_sample(9 - n, n % 3, difficulty=n / 8) for n in range(3)), tmp_path / "other")
        (tmp_path / "other" / "shard-000000.tar").replace(ladder / "shard-000000.tar")
        assert ids(dataset) == ["shard_changed"] * 3 + ALL[3:]

    def test_a_body_that_is_cut_off(self, url, range_server):
        def cut(handler):
            handler.send_response(206)
            handler.send_header("Content-Length", "4096")
            handler.end_headers()
            handler.wfile.write(b"x" * 100)
            handler.close_connection = True
            range_server.faults = lambda handler: False
            return True

        dataset = LadderDataset(url, remote=RemoteOptions(**QUICK))
        range_server.faults = cut
        assert isinstance(dataset[4], Prompt)

    def test_bytes_that_change_on_the_way(self, url, range_server):
        def garble(handler):
            start, end = map(int, handler.headers["Range"].removeprefix("bytes=").split("-"))
            handler.send_response(206)
            handler.send_header("Content-Length", str(end - start + 1))
            handler.end_headers()
            handler.wfile.write(bytes(end - start + 1))
            return True

        dataset = LadderDataset(url, remote=RemoteOptions(**QUICK))
        range_server.faults = garble
        assert dataset[4].reason == "shard_changed"

    def test_a_server_without_range_requests_is_refused(self, url, range_server):
        range_server.ranges = False
        with pytest.raises(ValueError, match="sends the whole file when it is asked for a part"):
            LadderDataset(url)

    @pytest.mark.parametrize("wrong", [{"timeout": 0}, {"attempts": 0}, {"backoff": -1}, {"cache_gigabytes": 0}])
    def test_impossible_options(self, wrong):
        with pytest.raises(ValueError, match=rf"remote\.{next(iter(wrong))} "):
            RemoteOptions(**wrong)


class TestCache:
    @pytest.fixture
    def options(self, tmp_path):
        return RemoteOptions(**QUICK, cache_directory=str(tmp_path / "cache"))

    def test_a_shard_is_fetched_once(self, url, ladder, range_server, options):
        dataset = LadderDataset(url, remote=options)
        range_server.bytes_sent.clear()
        assert ids(dataset) == ids(dataset) == ALL
        assert range_server.bytes_sent == {tar.name: tar.stat().st_size for tar in ladder.glob("*.tar")}

    def test_it_outlives_the_server(self, url, range_server, options):
        dataset = LadderDataset(url, remote=options)
        assert ids(dataset) == ALL
        range_server.fails(500)
        assert ids(dataset) == ALL

    def test_the_least_recently_used_goes(self, url, ladder, range_server, tmp_path):
        sizes = [tar.stat().st_size for tar in sorted(ladder.glob("*.tar"))]
        options = RemoteOptions(
            **QUICK, cache_directory=str(tmp_path / "cache"), cache_gigabytes=(sum(sizes) - 1) / 1e9
        )
        dataset = LadderDataset(url, remote=options)
        for position in (0, 3, 1, 6):  # shards 0, 1, 0, 2: 1 has to go
            assert isinstance(dataset[position], Prompt)
            time.sleep(0.02)
        range_server.bytes_sent.clear()
        for position in (2, 7):
            assert isinstance(dataset[position], Prompt)
        assert not range_server.bytes_sent
        assert isinstance(dataset[4], Prompt)
        assert range_server.bytes_sent == {"shard-000001.tar": sizes[1]}

    def test_a_shard_larger_than_the_cache_is_read_by_range(self, url, range_server, tmp_path):
        options = RemoteOptions(**QUICK, cache_directory=str(tmp_path / "cache"), cache_gigabytes=1e-6)
        dataset = LadderDataset(url, remote=options)
        assert ids(dataset) == ALL
        assert not list((tmp_path / "cache").glob("*.tar"))

    def test_a_damaged_copy_is_replaced(self, url, range_server, options, tmp_path, caplog):
        dataset = LadderDataset(url, remote=options)
        assert ids(dataset) == ALL
        for copy in (tmp_path / "cache").glob("*.tar"):
            copy.write_bytes(bytes(copy.stat().st_size))
        assert ids(dataset) == ALL
        assert "is damaged and is fetched again" in caplog.text
        range_server.fails(500)
        assert ids(dataset) == ALL

    def test_a_replaced_shard_is_not_fetched_again_and_again(self, url, ladder, range_server, options):
        dataset = LadderDataset(url, remote=options)
        shard = ladder / "shard-000000.tar"
        size = shard.stat().st_size
        shard.write_bytes(bytes(size))
        range_server.bytes_sent.clear()
        assert ids(dataset)[:3] == ["shard_changed"] * 3
        assert range_server.bytes_sent[shard.name] <= 2 * size

    def test_a_fetch_that_fails_leaves_nothing_behind(self, url, range_server, options, tmp_path):
        dataset = LadderDataset(url, missing_shards="skip", remote=options)
        range_server.fails(500, file=".tar")
        assert ids(dataset) == ["shard_unreachable"] * 9
        assert {path.name for path in (tmp_path / "cache").iterdir()} <= {"index", "lock"}

    def test_what_a_killed_process_left_is_removed(self, url, range_server, options, tmp_path):
        dataset = LadderDataset(url, remote=options)
        (tmp_path / "cache" / "0123.part").write_bytes(bytes(1000))
        assert ids(dataset) == ALL
        assert not list((tmp_path / "cache").glob("*.part"))

    def test_several_processes_stay_within_the_bound(self, tmp_path):
        """Eight shards of 100 kB, room for three, four processes that read all of them at the same time."""
        for number in range(8):
            (tmp_path / f"{number}.tar").write_bytes(bytes([number]) * 100_000)
        context = multiprocessing.get_context("fork")
        readers = [context.Process(target=read_through_cache, args=(tmp_path, seed)) for seed in range(4)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        assert [reader.exitcode for reader in readers] == [0] * 4
        assert len(list((tmp_path / "cache").glob("*.tar"))) == 3


def used_bytes(directory: Path) -> int:
    """Of all files at one time: under the lock that makes room, as files that come and go would be added up."""
    total = 0
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in directory.glob("*"):
            with suppress(FileNotFoundError):
                total += path.stat().st_size
    return total


def read_through_cache(directory: Path, seed: int) -> None:
    cache = ShardCache(directory / "cache", 310_000, Files())
    for turn in range(80):
        number = (turn * (seed + 1) * 3 + seed) % 8
        content = cache.read(f"file://{directory}/{number}.tar", 100_000, 500 * turn, 500)
        assert content in (None, bytes([number]) * 500)
        assert used_bytes(cache.directory) <= 310_000


def test_the_index_of_a_changed_remote_shard_is_made_again(url, ladder, make_sample, tmp_path):
    options = RemoteOptions(cache_directory=str(tmp_path / "cache"))
    index_path(ladder / "shard-000001.tar").unlink()
    assert ids(LadderDataset(url, remote=options)) == ALL
    write_ladder((make_sample(n + 20, 1) for n in range(3)), tmp_path / "other")
    (tmp_path / "other" / "shard-000000.tar").replace(ladder / "shard-000001.tar")
    assert ids(LadderDataset(url, remote=options)) == [*ALL[:3], *(f"geo.3k-{n + 20}" for n in range(3)), *ALL[6:]]


def test_errors_reach_the_training_process(url, range_server):
    dataset = LadderDataset(url, remote=RemoteOptions(**QUICK))
    range_server.fails(500, file=".tar")
    loader = DataLoader(dataset, batch_size=None, sampler=SequentialSampler(dataset), num_workers=1, timeout=300)
    with pytest.raises(Unreachable, match="could not be read 3 times"):
        next(iter(loader))


def test_skipped_is_what_a_bad_position_gives(url, range_server):
    range_server.fails(500, file="shard-000001.tar")
    dataset = LadderDataset(url, missing_shards="skip", remote=RemoteOptions(**QUICK))
    assert isinstance(dataset[3], Skipped)


@pytest.mark.slow
def test_a_run_counts_what_it_lost(tmp_path, tiny_ladder, range_server, command_line):
    """One of three shards cannot be read once training has begun, one sample of another has a flipped bit."""
    shutil.copytree(tiny_ladder, tmp_path / "ladder")
    shard = tmp_path / "ladder" / "shard-000002.tar"
    content = bytearray(shard.read_bytes())
    content[open_index(shard).spans[3].offset + 2000] ^= 1
    shard.write_bytes(content)

    def fails(handler):
        start, _, end = handler.headers.get("Range", "bytes=0-0").removeprefix("bytes=").partition("-")
        if "shard-000001.tar" not in handler.path or int(end) - int(start) < 512:  # not the headers, read at the start
            return False
        handler.send_response(503)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return True

    range_server.faults = fails
    command_line(tmp_path)(
        "fit",
        "--config=quickstart.yaml",
        "--trainer.enable_progress_bar=false",
        "--model.sampling={group_size: 2, max_new_tokens: 8}",
        "--data.class_path=observe_r1.datamodules.NeuraLadderDataModule",
        f"--data.ladder={range_server.url}/ladder",
        "--data.prompts_per_rollout=8",
        "--data.missing_shards=skip",
        "--data.remote={attempts: 2, backoff: 0.01}",
        "--trainer.callbacks=observe_r1.callbacks.RunSummary",
    )
    (summary,) = (tmp_path / "runs").rglob("summary.json")
    document = json.loads(summary.read_text())
    assert document["status"] == "finished"
    assert document["skipped"]["train"] == {"shard_unreachable": 8, "shard_changed": 1}
    assert sum(document["verdicts"]["train"].values()) == 15 * 2
