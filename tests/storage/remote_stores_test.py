"""Token stores on gs://, against a stand-in for it: fetched by shards, the batches those of a copy
that is near."""

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

from dgpt_jax import batching, orders, pipeline, records, shard_cache, shards, token_store
from dgpt_jax.config import Data, Model
from dgpt_jax.schema import UserError, parse
from tests import data, gcs, processes, stores

MODEL = parse(Model, {"image_size": 16, "patch": 4})
LENGTHS = [4, 3, 5, 4] * 10
BATCH, LANES, WINDOW = 8, 4, 2


@pytest.fixture(scope="module")
def near(tmp_path_factory):
    return stores.write(tmp_path_factory.mktemp("far") / "tokens", LENGTHS, views=2)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(shard_cache, "FIRST_DELAY", 0.01)
    retry = importlib.import_module("gcsfs.retry")  # after what dgpt_jax.gcs settles
    monkeypatch.setattr(retry, "min", lambda *_: 0.01, raising=False)  # its delays
    with gcs.Server() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        yield server


@pytest.fixture
def far(server, near):
    return server.add(near, "somewhere/tokens")


def open_far(path, cache="", **changes):
    settings = {"threads": 4, "lanes": LANES, "window": WINDOW} | changes
    settings |= {"path": str(path), "cache": str(cache)}
    return pipeline.open_examples(parse(Data, settings), MODEL, seed=3)


def batches(examples, count, *, start=0, rows=range(BATCH)):
    rows = np.array(rows)
    stream = batching.train_batches(examples, BATCH, rows=rows, start_step=start)
    with contextlib.closing(stream):
        return [next(stream) for _ in range(count)]


def expected(near, steps):
    """The batches, read one by one from the copy that is near."""
    order = orders.Lanes([LENGTHS] * 2, BATCH, LANES, WINDOW, seed=3)
    examples = open_far(near)
    for step in steps:
        read = [
            examples(position, index, epoch)
            for position in range(step * BATCH, (step + 1) * BATCH)
            for epoch, index in [order(position)]
        ]
        yield {key: np.stack([example[key] for example in read]) for key in read[0]}


def assert_same(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def eventually(condition, seconds=10):
    """Requests that are under way when batches are closed come to their end."""
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    assert condition()


def test_batches_are_those_of_a_near_copy_and_of_every_host(near, far):
    wanted = list(expected(near, range(45)))  # 160 examples an epoch: into the third
    assert_same(batches(open_far(far), 45), wanted)
    for hosts in (2, 4):
        parts = np.split(np.arange(BATCH), hosts)
        for rows in (parts[0], parts[-1]):
            mine = [{key: value[rows] for key, value in batch.items()} for batch in wanted]
            assert_same(batches(open_far(far), 45, rows=rows), mine)
    assert_same(batches(open_far(far), 3, start=30), wanted[30:33])


def test_a_seek_fetches_what_is_read_from_there(far, server):
    examples = open_far(far)
    server.reset()
    batches(examples, 1, start=15)
    assert len(server.media) <= LANES * (3 * WINDOW - 1)


def test_a_host_fetches_its_share(far, server):
    epoch = sum(LENGTHS) // BATCH
    total = 64 * 2**10 * len(LENGTHS) * 2  # what shards are padded to, twice
    for rows in np.split(np.arange(BATCH), 4):
        examples = open_far(far, window=1)
        server.reset()
        batches(examples, epoch - 2, rows=rows)
        cache = examples.sources.splits[0].cache
        eventually(lambda cache=cache: not cache.files() and server.sent == cache.fetched_bytes)
        assert examples.counters()["fetched_bytes"] == server.sent
        assert examples.counters()["fetch_wait_seconds"] > 0
        assert 0.2 * total < server.sent <= 0.45 * total
        assert max(Counter(server.media).values()) == 1  # nothing twice


@pytest.mark.parametrize("batch_size, steps", [(8, 40), (64, 8)])
def test_a_shard_is_fetched_once_a_time_that_it_is_announced(far, server, batch_size, steps):
    """Though 64 rows read more than a window of every lane in a step."""
    examples = open_far(far)
    order, splits = batching._order(examples, batch_size), examples.sources.splits
    expected, here = Counter(), set()
    for step in range(steps):
        ahead = order.ahead(order.current(step, range(LANES)))
        names = {splits[epoch % 2].shards[shard].filename for epoch, shard in ahead}
        expected.update(name.removeprefix("gs://bucket/") for name in names - here)
        here = names
    server.reset()
    stream = batching.train_batches(examples, batch_size, rows=np.arange(batch_size), start_step=0)
    with contextlib.closing(stream):
        for _ in range(steps):
            next(stream)
        eventually(lambda: len(server.media) >= expected.total())
        assert Counter(name for name, _ in server.media) == expected


def test_the_cache_is_bounded_and_empties(far, tmp_path):
    examples = open_far(far, tmp_path, window=1)
    cache, held = examples.sources.splits[0].cache, []
    stream = batching.train_batches(examples, BATCH, rows=np.arange(BATCH), start_step=0)
    for _ in range(25):
        next(stream)
        held.append(len([path for path in cache.files() if path.suffix != ".partial"]))
    stream.close()
    most = batching._order(examples, BATCH).most_shards
    assert LANES <= max(held) <= LANES * most + shard_cache.UNANNOUNCED
    eventually(lambda: not cache.files())
    assert list(tmp_path.iterdir())  # the directory itself stays until the process ends


@pytest.mark.parametrize("every", [3, 7])
def test_failures_that_pass_change_nothing(near, far, server, every):
    server.fail_every = every
    assert_same(batches(open_far(far), 8), expected(near, range(8)))
    assert server.failed > 5


def test_a_request_that_hangs_is_given_up_and_made_again(near, far, server, monkeypatch):
    monkeypatch.setattr(shard_cache, "STALLED", 1)
    examples = open_far(far)
    server.stall = "view000.array_record-00007"
    threading.Timer(0.5, lambda: setattr(server, "stall", "")).start()
    began = time.monotonic()
    assert_same(batches(examples, 20), expected(near, range(20)))
    assert time.monotonic() - began < 20


def test_a_shard_that_cannot_be_fetched(far, server):
    examples = open_far(far)
    server.broken = "view000.array_record-00007"
    began = time.monotonic()
    with pytest.raises(UserError, match=r"gs://.*view000.*-00007-of-00040 cannot be fetched"):
        batches(examples, 20)
    assert time.monotonic() - began < 20
    server.broken = ""
    assert len(batches(examples, 20)) == 20  # what failed is tried again


def test_a_shard_that_is_shorter_than_the_listing_said(far, server):
    examples = open_far(far)
    name = next(name for name in server.objects if "view000.array_record-00007" in name)
    server.objects[name] = server.objects[name][:1000]
    with pytest.raises(UserError, match=r"-00007-of-00040 cannot be fetched.*1000 bytes came"):
        batches(examples, 20)


def test_what_opening_finds(far, server):
    server.reset()
    open_far(far)
    assert not [name for name, _ in server.media if "view" in name]
    # None a shard. gcsfs asks for an object and for what lies below it at once, and gives the
    # second up where the first is there in time: 35 to 44 in all.
    assert server.requests < 2 * len(LENGTHS)
    name = next(name for name in server.objects if "view001.array_record-00007" in name)
    whole = server.objects.pop(name)
    with pytest.raises(UserError, match="view001.*00007-of-00040 is missing"):
        open_far(far)
    server.objects[name] = whole
    with pytest.raises(UserError, match="no such directory: gs://bucket/elsewhere"):
        open_far("gs://bucket/elsewhere")
    with pytest.raises(UserError, match="config.data.workers must be 0"):
        open_far(far, workers=1)
    del server.objects["somewhere/tokens/dataset_info.json"]
    with pytest.raises(UserError, match="unfinished"):
        open_far(far)


def test_a_disk_that_is_too_small(far, server, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    examples = open_far(far, tmp_path)
    server.reset()
    with pytest.raises(UserError, match=r"window, fewer config.data.lanes or .*data.cache"):
        batches(examples, 1)
    assert not server.media


def test_a_split_is_read_without_being_announced(far, server):
    split = records.Split(far, "view001")
    server.broken = "view001"
    with pytest.raises(UserError, match="cannot be fetched"):
        split[5]
    server.broken = ""
    assert [e["id"] for e in split] == [f"1/{i}" for i in range(sum(LENGTHS))]
    assert len(split.cache.files()) <= shard_cache.UNANNOUNCED
    assert split[0]["id"] == "1/0"  # evicted long ago
    assert split.cache.fetched_bytes > 0 and split.cache.waited_seconds > 0


def test_what_a_killed_process_left_is_removed(tmp_path):
    code = (
        "import os, sys; from dgpt_jax import shard_cache as s; c = s.ShardCache(sys.argv[1]);"
        "c.refuse_unless_it_fits(1, 1, ''); (c._directory / '1.shard').write_text('x');"
        "sys.argv[2:] and os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path, "die"], check=False, timeout=60)
    assert list(tmp_path.glob("*/1.shard"))
    mine = shard_cache.ShardCache(str(tmp_path))
    mine.refuse_unless_it_fits(1, 1, "")
    assert not list(tmp_path.glob("*/1.shard"))
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, timeout=60)
    assert len(list(tmp_path.iterdir())) == 1  # mine; the other went with its process


def test_a_shard_is_uploaded_whole(server):
    path = records.shard_path("gs://bucket/new/tokens", "view000", 0, 1)
    info = stores.store_info(grid=(16, 16), width=1024)
    receipt = shards.write(path, stores.serialized(info, [str(i) for i in range(60)]))
    assert receipt.records == 60 and receipt.bytes > 15e6  # in several pieces
    assert shards.sizes("gs://bucket/new/tokens")[path.name] == receipt.bytes
    assert shards.receipts("gs://bucket/new/tokens") == {path.name: receipt}
    with ThreadPoolExecutor(2) as pool:
        known = {path.name: receipt}
        assert shards.damaged("gs://bucket/new/tokens", known, pool, check=True) == []
        known = {path.name: dataclasses.replace(receipt, crc32="00000000")}
        assert shards.damaged("gs://bucket/new/tokens", known, pool, check=False) == []
        assert shards.damaged("gs://bucket/new/tokens", known, pool, check=True) == [path.name]
    shards.forget(path)
    assert shards.receipts("gs://bucket/new/tokens") == {}
    assert not token_store.exists("gs://bucket/new/tokens")


def test_a_store_built_on_gs(server, tmp_path, monkeypatch):
    """By google-cloud-cpp's name for the stand-in; a second run keeps what is there."""
    dataset, teacher = data.image_dataset(tmp_path, 5), data.random_teacher(tmp_path / "teacher")
    settings = {"views": 2, "shard_size": 4, "batch_size": 3, "source": dataset, "threads": 2}
    settings |= {"picture_size": 16, "picture": "png", "teacher.weights": teacher}
    words = ["tools/build_tokens.py", "--config=configs/quickstart_tokens.py"]
    words += [f"--config.{name}={value}" for name, value in settings.items()]
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", server.url)
    for out in (tmp_path / "tokens", "gs://bucket/built/tokens", "gs://bucket/built/tokens"):
        process = processes.start([*words, f"--out={out}"])
        (output,) = processes.outputs_of([process], timeout=120)
        assert process.returncode == 0, output[-2000:]
    assert "20 of 20 examples are there and whole" in output
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    there = {name.rpartition("/")[2]: data for name, data in server.objects.items()}
    near = {path.name: path.read_bytes() for path in (tmp_path / "tokens").glob("*array_record*")}
    assert len(near) == 6 and near.items() <= there.items()
    far = records.Split("gs://bucket/built/tokens", "view001")
    assert [e["id"] for e in far] == [e["id"] for e in records.Split(dataset, "train")]


def test_far_shards_without_a_manifest_are_counted_when_they_are_here(near, far, server):
    del server.objects["somewhere/tokens/manifest.json"]
    assert_same(batches(open_far(far), 3), expected(near, range(3)))
    first, second = (
        next(name for name in server.objects if f"view000.array_record-{i:05d}" in name)
        for i in (0, 1)
    )
    whole = server.objects[first]
    server.objects[first] = server.objects[second]
    with pytest.raises(UserError, match="view000.*00000-of-00040 holds 3 records, .* say 4"):
        batches(open_far(far), 20)
    server.objects[first] = whole[:70_000]
    with pytest.raises(UserError, match="gs.*00000-of-00040, fetched: .*damaged or truncated"):
        batches(open_far(far), 20)


@pytest.mark.slow
def test_training_on_gs(far, server, tmp_path):
    """The whole loop, held-out examples from gs:// included; the cache goes with the process."""
    flags = {
        "data.path": far, "data.cache": tmp_path / "cache", "data.lanes": 4, "data.threads": 2,
        "evals.heldout": far, "evals.every": "4 steps", "evals.batch_size": 16, "evals.knn": "",
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
