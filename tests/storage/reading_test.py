"""Local token stores are verified from one listing and read with two views' files open."""

import contextlib
import gc
import resource

import numpy as np
import psutil
import pytest

from dgpt_jax.config import DataConfig, ModelConfig
from dgpt_jax.config.schema import parse
from dgpt_jax.data import dataset, loader
from dgpt_jax.errors import UserError
from dgpt_jax.storage import array_record_shards, file_limits, tfds_dataset
from tests.support import stores

MODEL = parse(ModelConfig, {"image_size": 16, "patch": 4})
# view/index of the first rows of the stream with seed 3 over 13 examples.
PINNED = """
    0/4 0/6 0/9 0/7 0/5 0/3
    0/1 0/12 0/10 0/0 0/2 0/8
    0/11 1/8 1/1 1/3 1/7 1/9
    1/10 1/5 1/4 1/2 1/12 1/11
    1/0 1/6 0/12 0/0 0/7 0/9
"""


def open_store(path, **changes):
    data = parse(DataConfig, {"path": str(path), "threads": 2} | changes)
    return dataset.open_examples(data, MODEL, seed=3)


def batches(examples, count, batch_size, *, start=0):
    rows = np.arange(batch_size)
    stream = loader.train_batches(examples, batch_size, rows=rows, start_step=start)
    with contextlib.closing(stream):
        return [next(stream) for _ in range(count)]


@pytest.fixture
def store(tmp_path):
    """A store whose shards differ in size: files are multiples of 64 KiB."""
    info = stores.store_info(grid=(8, 8), width=64)
    return stores.write(tmp_path / "tokens", [30, 30, 3], views=2, info=info)


def shard_of(store, view, shard):
    return next(store.glob(f"tokens-view{view:03d}*-{shard:05d}-of-*"))


def test_sizes_are_checked_without_opening_shards(store, monkeypatch):
    monkeypatch.setattr(array_record_shards, "count", lambda path: pytest.fail(f"{path} is opened"))
    assert len(open_store(store)) == 63


@pytest.mark.parametrize("manifest", [True, False])
def test_incomplete_shards_are_refused(store, manifest):
    if not manifest:
        (store / array_record_shards.MANIFEST).unlink()
    assert len(open_store(store)) == 63
    shard = shard_of(store, 1, 1)
    original = shard.read_bytes()
    shard.write_bytes(original[: len(original) // 2])
    with pytest.raises(UserError, match="view001.*damaged or truncated"):
        open_store(store)
    shard.write_bytes(shard_of(store, 0, 2).read_bytes())
    with pytest.raises(UserError, match="view001.* 3 records, .* 30"):
        open_store(store)
    shard.unlink()
    with pytest.raises(UserError, match=r"view001.*00001-of-00003 is missing"):
        open_store(store)
    assert len(open_store(store, views=1)) == 63  # views that are not used may be missing


def test_a_replaced_shard_is_refused(store):
    shard = shard_of(store, 0, 0)
    features = tfds_dataset.open_builder(store).info.features
    example = next(iter(tfds_dataset.Split(store, "view000"))) | {"id": "longer than before" * 200}
    array_record_shards.write(shard, [features.serialize_example(example)] * 30)
    with pytest.raises(UserError, match=r"manifest.json says \d+"):
        open_store(store)


def test_an_unfinished_store_is_refused_first(store):
    (store / "dataset_info.json").unlink()
    shard_of(store, 0, 0).unlink()
    with pytest.raises(UserError, match="unfinished.*build_tokens.py --out=HERE"):
        open_store(store, targets="online")


def test_the_order_of_local_examples_is_pinned(tmp_path):
    """Runs of earlier versions resume with the same batches."""
    store = stores.write(tmp_path / "tokens", [5, 5, 3], views=2)
    names = stores.names(batches(open_store(store), 5, 6), store, views=2)
    assert names == [line.split() for line in PINNED.split("\n") if line.strip()]


def read_wide(tmp_path, *, examples, shard_size, views, reads):
    """Returns [RSS in MB, open files] after each view of random reads."""
    path = stores.write_linked(
        tmp_path / "tokens", examples=examples, shard_size=shard_size, views=views
    )
    process, rng, usage = psutil.Process(), np.random.default_rng(0), []
    opened = open_store(path)
    for view in range(4):
        for index in rng.integers(len(opened), size=reads // 4):
            opened(0, int(index), epoch=view)
        gc.collect()
        usage.append((process.memory_info().rss / 1e6, process.num_fds()))
    return usage


def check_wide(tmp_path, shards_per_view, memory, **kwargs):
    process = psutil.Process()
    gc.collect()  # closes files of earlier tests
    before = process.num_fds()
    rss = process.memory_info().rss / 1e6
    usage = read_wide(tmp_path, **kwargs)
    print(f"RSS {rss:.0f} MB, then (RSS, files) {usage}")
    files = [files - before for _, files in usage]
    assert shards_per_view * 0.9 < files[0] <= shards_per_view + 50
    assert max(files) <= 2 * shards_per_view + 50
    assert max(rss for rss, _ in usage) - rss < memory


def test_two_views_at_most_are_open(tmp_path):
    check_wide(tmp_path, 100, 100, examples=100 * 8 - 3, shard_size=8, views=4, reads=3000)


@pytest.mark.slow
def test_14_million_examples_in_8_views(tmp_path):
    check_wide(tmp_path, 1709, 300, examples=14_000_000, shard_size=8192, views=8, reads=20_000)


def test_the_limit_of_open_files_is_raised_as_needed(store, monkeypatch):
    limits = {"now": (20, 5000)}
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits["now"])
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.update(now=new))
    open_store(store)
    soft, hard = limits["now"]
    assert 2 * 3 + file_limits.SPARE <= soft < 1000 and hard == 5000
    limits["now"] = (100, 150)
    with pytest.raises(UserError, match=r"needs \d+ open files, .* 150.*ulimit"):
        open_store(store)
