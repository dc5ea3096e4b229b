"""Token stores on gs:// (an emulator): shards are fetched, batches equal those of a local copy."""

import contextlib
import dataclasses
import importlib
import json
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dgpt_jax.config import DataConfig, ModelConfig
from dgpt_jax.config.schema import parse
from dgpt_jax.data import dataset, loader, samplers, token_store
from dgpt_jax.errors import UserError
from dgpt_jax.storage import array_record_shards, chunk_download, shard_cache, tfds_dataset
from tests.support import data, gcs, processes, stores

MODEL = parse(ModelConfig, {"image_size": 16, "patch": 4})
LENGTHS = [4, 3, 5, 4] * 10
BATCH, LANES, WINDOW = 8, 4, 2


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return stores.write(tmp_path_factory.mktemp("remote") / "tokens", LENGTHS, views=2)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(chunk_download, "FIRST_DELAY", 0.01)
    retry = importlib.import_module("gcsfs.retry")  # after dgpt_jax.storage.gcs has configured it
    monkeypatch.setattr(retry, "min", lambda *_: 0.01, raising=False)  # its delays
    with gcs.Server() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        yield server


@pytest.fixture
def remote(server, local):
    return server.add(local, "somewhere/tokens")


def open_remote(path, cache="", **changes):
    settings = {"threads": 4, "lanes": LANES, "window": WINDOW} | changes
    settings |= {"path": str(path), "cache": str(cache)}
    return dataset.open_examples(parse(DataConfig, settings), MODEL, seed=3)


def batches(examples, count, *, start=0, rows=range(BATCH)):
    rows = np.array(rows)
    stream = loader.train_batches(examples, BATCH, rows=rows, start_step=start)
    with contextlib.closing(stream):
        return [next(stream) for _ in range(count)]


def expected(local, steps):
    """The batches, read one by one from the local copy."""
    order = samplers.ShardWindowSampler([LENGTHS] * 2, BATCH, LANES, WINDOW, seed=3)
    examples = open_remote(local)
    for step in steps:
        read = [
            examples(position, index, epoch)
            for position in range(step * BATCH, (step + 1) * BATCH)
            for epoch, index in [order(position)]
        ]
        yield {key: np.stack([example[key] for example in read]) for key in read[0]}


def assert_same(actual, desired):
    for a, b in zip(actual, desired, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def eventually(condition, seconds=10):
    """Waits for requests that are in flight when batches are closed."""
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    assert condition()


def test_batches_equal_those_of_a_local_copy_on_every_host(local, remote):
    desired = list(expected(local, range(45)))  # 160 examples an epoch: into the third
    assert_same(batches(open_remote(remote), 45), desired)
    for hosts in (2, 4):
        parts = np.split(np.arange(BATCH), hosts)
        for rows in (parts[0], parts[-1]):
            shares = [{key: value[rows] for key, value in batch.items()} for batch in desired]
            assert_same(batches(open_remote(remote), 45, rows=rows), shares)
    assert_same(batches(open_remote(remote), 3, start=30), desired[30:33])


def test_a_seek_fetches_only_shards_from_there(remote, server):
    examples = open_remote(remote)
    server.reset()
    batches(examples, 1, start=15)
    assert len(server.media) <= LANES * (3 * WINDOW - 1)


def test_a_host_fetches_its_share(remote, server):
    epoch = sum(LENGTHS) // BATCH
    total = 64 * 2**10 * len(LENGTHS) * 2  # padded size of both views
    for rows in np.split(np.arange(BATCH), 4):
        examples = open_remote(remote, window=1)
        server.reset()
        batches(examples, epoch - 2, rows=rows)
        cache = examples.sources.splits[0].cache
        eventually(lambda cache=cache: not cache.files() and server.sent == cache.fetched_bytes)
        assert examples.counters()["fetched_bytes"] == server.sent
        assert examples.counters()["fetch_wait_seconds"] > 0
        assert 0.2 * total < server.sent <= 0.45 * total
        assert max(Counter(server.media).values()) == 1  # no shard twice


@pytest.mark.parametrize("batch_size, steps", [(8, 40), (64, 8)])
def test_a_shard_is_fetched_once_per_prefetch(remote, server, batch_size, steps):
    """Also if 64 rows read more than a window of every lane in a step."""
    examples = open_remote(remote)
    order, splits = loader._sampler(examples, batch_size), examples.sources.splits
    expected, cached = Counter(), set()
    for step in range(steps):
        ahead = order.shards_to_fetch(order.current_windows(step, range(LANES)))
        names = {splits[epoch % 2].shards[shard].filename for epoch, shard in ahead}
        expected.update(name.removeprefix("gs://bucket/") for name in names - cached)
        cached = names
    server.reset()
    stream = loader.train_batches(examples, batch_size, rows=np.arange(batch_size), start_step=0)
    with contextlib.closing(stream):
        for _ in range(steps):
            next(stream)
        eventually(lambda: len(server.media) >= expected.total())
        assert Counter(name for name, _ in server.media) == expected


def test_the_cache_is_bounded_and_is_emptied(remote, tmp_path):
    examples = open_remote(remote, tmp_path, window=1)
    cache, counts = examples.sources.splits[0].cache, []
    stream = loader.train_batches(examples, BATCH, rows=np.arange(BATCH), start_step=0)
    for _ in range(25):
        next(stream)
        counts.append(len([path for path in cache.files() if path.suffix != ".partial"]))
    stream.close()
    most = loader._sampler(examples, BATCH).max_shards_per_lane
    assert LANES <= max(counts) <= LANES * most + shard_cache.MAX_UNPLANNED
    eventually(lambda: not cache.files())
    assert list(tmp_path.iterdir())  # the directory itself stays until the process ends


@pytest.mark.parametrize("every", [3, 7])
def test_transient_failures_change_nothing(local, remote, server, every):
    server.fail_every = every
    assert_same(batches(open_remote(remote), 8), expected(local, range(8)))
    assert server.failed > 5


def test_a_stalled_request_is_retried(local, remote, server, monkeypatch):
    monkeypatch.setattr(chunk_download, "STALLED", 1)
    examples = open_remote(remote)
    server.stall = "view000.array_record-00007"
    threading.Timer(0.5, lambda: setattr(server, "stall", "")).start()
    assert_same(batches(examples, 20), expected(local, range(20)))


def test_an_unreachable_shard(remote, server):
    examples = open_remote(remote)
    server.broken = "view000.array_record-00007"
    with pytest.raises(UserError, match=r"gs://.*view000.*-00007-of-00040 cannot be fetched"):
        batches(examples, 20)
    server.broken = ""
    assert len(batches(examples, 20)) == 20  # failed shards are tried again


def test_a_shard_shorter_than_listed(remote, server):
    examples = open_remote(remote)
    name = next(name for name in server.objects if "view000.array_record-00007" in name)
    server.objects[name] = server.objects[name][:1000]
    with pytest.raises(UserError, match=r"-00007-of-00040 cannot be fetched.*1000 bytes"):
        batches(examples, 20)


def test_opening_a_remote_store(remote, server):
    server.reset()
    open_remote(remote)
    assert not [name for name, _ in server.media if "view" in name]
    # No request per shard. gcsfs requests an object and its listing concurrently, and cancels the
    # second if the first arrives in time: 35 to 44 in all.
    assert server.requests < 2 * len(LENGTHS)
    name = next(name for name in server.objects if "view001.array_record-00007" in name)
    original = server.objects.pop(name)
    with pytest.raises(UserError, match="view001.*00007-of-00040 is missing"):
        open_remote(remote)
    server.objects[name] = original
    with pytest.raises(UserError, match="no such directory: gs://bucket/elsewhere"):
        open_remote("gs://bucket/elsewhere")
    with pytest.raises(UserError, match="config.data.workers must be 0"):
        open_remote(remote, workers=1)
    del server.objects["somewhere/tokens/dataset_info.json"]
    with pytest.raises(UserError, match="unfinished"):
        open_remote(remote)


def test_too_small_a_disk(remote, server, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    examples = open_remote(remote, tmp_path)
    server.reset()
    with pytest.raises(UserError, match=r"window, fewer config.data.lanes or .*data.cache"):
        batches(examples, 1)
    assert not server.media


def test_a_split_is_read_without_prefetch(remote, server):
    split = tfds_dataset.Split(remote, "view001")
    server.broken = "view001"
    with pytest.raises(UserError, match="cannot be fetched"):
        split[5]
    server.broken = ""
    assert [e["id"] for e in split] == [f"1/{i}" for i in range(sum(LENGTHS))]
    assert len(split.cache.files()) <= shard_cache.MAX_UNPLANNED
    assert split[0]["id"] == "1/0"  # evicted long ago
    assert split.cache.fetched_bytes > 0 and split.cache.waited_seconds > 0


def test_files_of_killed_processes_are_removed(tmp_path):
    code = (
        "import os, sys; from dgpt_jax.storage import shard_cache;"
        "c = shard_cache.ShardCache(sys.argv[1]);"
        "c.refuse_unless_it_fits(1, 1, ''); (c._directory / '1.shard').write_text('x');"
        "sys.argv[2:] and os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path, "die"], check=False, timeout=60)
    assert list(tmp_path.glob("*/1.shard"))
    cache = shard_cache.ShardCache(str(tmp_path))
    cache.refuse_unless_it_fits(1, 1, "")
    assert not list(tmp_path.glob("*/1.shard"))
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, timeout=60)
    assert len(list(tmp_path.iterdir())) == 1  # the other was removed when its process exited


def test_a_shard_is_uploaded_atomically(server):
    path = tfds_dataset.shard_path("gs://bucket/new/tokens", "view000", 0, 1)
    info = stores.store_info(grid=(16, 16), width=1024)
    receipt = array_record_shards.write(path, stores.serialized(info, [str(i) for i in range(60)]))
    assert receipt.records == 60 and receipt.bytes > 15e6  # in several pieces
    assert array_record_shards.sizes("gs://bucket/new/tokens")[path.name] == receipt.bytes
    assert array_record_shards.shard_infos("gs://bucket/new/tokens") == {path.name: receipt}
    with ThreadPoolExecutor(2) as pool:
        known = {path.name: receipt}
        assert array_record_shards.damaged("gs://bucket/new/tokens", known, pool, check=True) == []
        known = {path.name: dataclasses.replace(receipt, crc32="00000000")}
        assert array_record_shards.damaged("gs://bucket/new/tokens", known, pool, check=False) == []
        assert array_record_shards.damaged("gs://bucket/new/tokens", known, pool, check=True) == [
            path.name
        ]
    array_record_shards.invalidate(path)
    assert array_record_shards.shard_infos("gs://bucket/new/tokens") == {}
    assert not token_store.exists("gs://bucket/new/tokens")


def test_a_store_built_on_gs(server, tmp_path, monkeypatch):
    """With google-cloud-cpp's variable for the emulator; a second run keeps the shards."""
    dataset, teacher = data.image_dataset(tmp_path, 5), data.random_teacher(tmp_path / "teacher")
    settings = {"views": 2, "shard_size": 4, "batch_size": 3, "source": dataset, "threads": 2}
    settings |= {"image_size": 16, "image_encoding": "png", "teacher.weights": teacher}
    words = ["tools/build_tokens.py", "--config=configs/quickstart_tokens.py"]
    words += [f"--config.{name}={value}" for name, value in settings.items()]
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", server.url)
    for out in (tmp_path / "tokens", "gs://bucket/built/tokens", "gs://bucket/built/tokens"):
        process = processes.start([*words, f"--out={out}"])
        (output,) = processes.outputs_of([process], timeout=120)
        assert process.returncode == 0, output[-2000:]
    assert "20 of 20 examples" in output
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    uploaded = {name.rpartition("/")[2]: data for name, data in server.objects.items()}
    local = {path.name: path.read_bytes() for path in (tmp_path / "tokens").glob("*array_record*")}
    assert len(local) == 6 and local.items() <= uploaded.items()
    remote = tfds_dataset.Split("gs://bucket/built/tokens", "view001")
    assert [e["id"] for e in remote] == [e["id"] for e in tfds_dataset.Split(dataset, "train")]


def test_remote_shards_without_a_manifest_are_counted_once_fetched(local, remote, server):
    del server.objects["somewhere/tokens/manifest.json"]
    assert_same(batches(open_remote(remote), 3), expected(local, range(3)))
    first, second = (
        next(name for name in server.objects if f"view000.array_record-{i:05d}" in name)
        for i in (0, 1)
    )
    original = server.objects[first]
    server.objects[first] = server.objects[second]
    with pytest.raises(UserError, match="view000.*00000-of-00040 has 3 records, .* say 4"):
        batches(open_remote(remote), 20)
    server.objects[first] = original[:70_000]
    with pytest.raises(UserError, match="gs.*00000-of-00040, fetched: .*damaged or truncated"):
        batches(open_remote(remote), 20)


@pytest.mark.slow
def test_training_on_gs(remote, server, tmp_path):
    """Trains and evaluates on gs://; the cache is removed when the process exits."""
    flags = {
        "data.path": remote, "data.cache": tmp_path / "cache", "data.lanes": 4, "data.threads": 2,
        "evals.heldout": remote, "evals.every": "4 steps", "evals.batch_size": 16, "evals.knn": "",
        "total": "8 steps", "batch_size": 8, "dtype": "float32", "log_every": 1,
        "optim.warmup": "1 steps", "checkpoint.every": "4 steps", "teacher.width": 4,
        "teacher.grid": 2,
    } | {f"model.{name}": value for name, value in data.TINY.items()}  # fmt: skip
    words = ["-m", "dgpt_jax.train", "--config=configs/quickstart.py", f"--workdir={tmp_path}/run"]
    process = processes.start([*words, *(f"--config.{k}={v}" for k, v in flags.items())])
    (output,) = processes.outputs_of([process], timeout=300)
    assert process.returncode == 0, output[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
    assert any("heldout/next" in line for line in lines)
    assert not list((tmp_path / "cache").iterdir())


def test_further_teachers_are_fetched_beside_the_store(local, server, tmp_path):
    """Their batches equal those of the local copy; one cache holds all files, within its bound."""
    copy = shutil.copytree(local, tmp_path / "tokens")
    for name in ("second", "third"):
        stores.write_teacher(copy, name)
    settings = {"threads": 4, "lanes": LANES, "window": WINDOW}

    def opened(path):
        config = parse(DataConfig, settings | {"path": str(path), "cache": str(tmp_path)})
        return dataset.open_examples(config, MODEL, 3, teachers=("second", "third"))

    examples, here = opened(server.add(copy, "somewhere/several")), opened(copy)
    order = samplers.ShardWindowSampler([LENGTHS] * 2, BATCH, LANES, WINDOW, seed=3)
    server.reset()
    most = 0
    with contextlib.closing(
        loader.train_batches(examples, BATCH, rows=np.arange(BATCH), start_step=0)
    ) as stream:
        for step in range(30):
            batch = next(stream)
            rows = []
            for position in range(step * BATCH, (step + 1) * BATCH):
                epoch, index = order(position)
                rows.append(here(position, index, epoch))
            assert {"tokens", "tokens_second", "tokens_third"} <= batch.keys() == rows[0].keys()
            for key in batch:
                np.testing.assert_array_equal(batch[key], np.stack([row[key] for row in rows]))
            most = max(most, len(examples.sources.splits[0].cache.files()))
    shards = LANES * order.max_shards_per_lane
    assert shards < most <= 3 * shards + shard_cache.MAX_UNPLANNED + shard_cache.DOWNLOADS
    objects = [object for object, _ in server.media]
    fetched = {name: sum(name in object for object in objects) for name in ("second", "third")}
    assert 0 < fetched["second"] == fetched["third"] < len(objects) / 2
