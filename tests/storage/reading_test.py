"""Token stores near by: opened by what a listing tells, read with the files of two views open."""

import contextlib
import gc
import resource
import time

import numpy as np
import psutil
import pytest

from dgpt_jax import batching, open_files, pipeline, records, shards
from dgpt_jax.config import Data, Model
from dgpt_jax.schema import UserError, parse
from tests import stores

MODEL = parse(Model, {"image_size": 16, "patch": 4})
# View and index of what the stream of seed 3 over 13 examples begins with.
PINNED = """
    0/4 0/6 0/9 0/7 0/5 0/3
    0/1 0/12 0/10 0/0 0/2 0/8
    0/11 1/8 1/1 1/3 1/7 1/9
    1/10 1/5 1/4 1/2 1/12 1/11
    1/0 1/6 0/12 0/0 0/7 0/9
"""


def open_store(path, **changes):
    data = parse(Data, {"path": str(path), "threads": 2} | changes)
    return pipeline.open_examples(data, MODEL, seed=3)


def batches(examples, count, batch_size, *, start=0):
    rows = np.arange(batch_size)
    stream = batching.train_batches(examples, batch_size, rows=rows, start_step=start)
    with contextlib.closing(stream):
        return [next(stream) for _ in range(count)]


@pytest.fixture
def store(tmp_path):
    """Of shards that differ in size: a file's is a multiple of 64 KiB."""
    info = stores.store_info(grid=(8, 8), width=64)
    return stores.write(tmp_path / "tokens", [30, 30, 3], views=2, info=info)


def shard_of(store, view, shard):
    return next(store.glob(f"tokens-view{view:03d}*-{shard:05d}-of-*"))


def test_sizes_tell_and_no_shard_is_opened(store, monkeypatch):
    monkeypatch.setattr(shards, "count", lambda path: pytest.fail(f"{path} is opened"))
    assert len(open_store(store)) == 63


@pytest.mark.parametrize("manifest", [True, False])
def test_shards_that_are_not_whole(store, manifest):
    if not manifest:
        (store / shards.MANIFEST).unlink()
    assert len(open_store(store)) == 63
    shard = shard_of(store, 1, 1)
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="view001.*damaged or truncated"):
        open_store(store)
    shard.write_bytes(shard_of(store, 0, 2).read_bytes())
    with pytest.raises(UserError, match="view001.*holds 3 records, the metadata say 30"):
        open_store(store)
    shard.unlink()
    with pytest.raises(UserError, match=r"view001.*00001-of-00003 is missing"):
        open_store(store)
    assert len(open_store(store, views=1)) == 63  # what is not read need not be there


def test_a_shard_that_was_exchanged(store):
    shard = shard_of(store, 0, 0)
    features = records.open_builder(store).info.features
    example = next(iter(records.Split(store, "view000"))) | {"id": "longer than before" * 200}
    shards.write(shard, [features.serialize_example(example)] * 30)
    with pytest.raises(UserError, match="were written .*another file"):
        open_store(store)


def test_an_unfinished_store_is_named_before_anything_else(store):
    (store / "dataset_info.json").unlink()
    shard_of(store, 0, 0).unlink()
    with pytest.raises(UserError, match="unfinished.*build_tokens.py --out=HERE"):
        open_store(store, targets="online")


def test_the_order_near_by_is_pinned(tmp_path):
    """Runs that were begun with earlier versions continue with the batches they would have had."""
    store = stores.write(tmp_path / "tokens", [5, 5, 3], views=2)
    found = stores.names(batches(open_store(store), 5, 6), store, views=2)
    assert found == [line.split() for line in PINNED.split("\n") if line.strip()]


def read_wide(tmp_path, *, examples, shard_size, views, reads):
    """(seconds to open, [RSS in MB, files open] after each view) of reading at random."""
    path = stores.write_linked(
        tmp_path / "tokens", examples=examples, shard_size=shard_size, views=views
    )
    process, rng, found = psutil.Process(), np.random.default_rng(0), []
    began = time.monotonic()
    opened = open_store(path)
    seconds = time.monotonic() - began
    for view in range(4):
        for index in rng.integers(len(opened), size=reads // 4):
            opened(0, int(index), epoch=view)
        gc.collect()
        found.append((process.memory_info().rss / 1e6, process.num_fds()))
    return seconds, found


def check_wide(tmp_path, shards_a_view, memory, **kwargs):
    process = psutil.Process()
    gc.collect()  # files that earlier tests have left open
    before = process.num_fds()
    rss = process.memory_info().rss / 1e6
    seconds, found = read_wide(tmp_path, **kwargs)
    print(f"opened in {seconds:.2f} s; RSS {rss:.0f} MB, then (RSS, files) {found}")
    assert seconds < 10
    files = [files - before for _, files in found]
    assert shards_a_view * 0.9 < files[0] <= shards_a_view + 50
    assert max(files) <= 2 * shards_a_view + 50
    assert max(rss for rss, _ in found) - rss < memory


def test_only_two_views_are_open(tmp_path):
    check_wide(tmp_path, 100, 100, examples=100 * 8 - 3, shard_size=8, views=4, reads=3000)


@pytest.mark.slow
def test_14_million_examples_in_8_views(tmp_path):
    check_wide(tmp_path, 1709, 300, examples=14_000_000, shard_size=8192, views=8, reads=20_000)


def test_the_limit_of_open_files_is_raised_as_far_as_needed(store, monkeypatch):
    limits = {"now": (20, 5000)}
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits["now"])
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.update(now=new))
    open_store(store)
    soft, hard = limits["now"]
    assert 2 * 3 + open_files.SPARE <= soft < 1000 and hard == 5000
    limits["now"] = (100, 150)
    with pytest.raises(UserError, match=r"needs \d+ open files, .* may have 150 here"):
        open_store(store)
