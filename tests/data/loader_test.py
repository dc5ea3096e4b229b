"""The batch is a function of (seed, step): from any start, for any processes and workers."""

import contextlib
import functools
import threading
import time
import weakref
from dataclasses import replace

import numpy as np
import pytest

from dgpt_jax import batching, orders, pipeline
from dgpt_jax.config import Data
from dgpt_jax.schema import parse
from tests.data import image_dataset, tiny_model

BATCH = 8
ALL = np.arange(BATCH)


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    path = image_dataset(tmp_path_factory.mktemp("batching"), per_class=11)
    data = parse(Data, {"path": str(path), "targets": "pixels"})
    return pipeline.open_examples(data, tiny_model(), seed=3)


def batches(examples, count, *, start=0, rows=ALL, workers=0, batch_size=BATCH):
    examples = replace(examples, data=replace(examples.data, workers=workers, threads=2))
    stream = batching.train_batches(examples, batch_size, rows=rows, start_step=start)
    with contextlib.closing(stream):
        return [next(stream) for _ in range(count)]


def reference(examples, step, *, rows, batch_size):
    """The batch, read one example after the other."""
    order = orders.Shuffled(len(examples), examples.seed)
    read = [
        examples(position, index, epoch)
        for position in step * batch_size + rows
        for epoch, index in [order(int(position))]
    ]
    return {key: np.stack([example[key] for example in read]) for key in read[0]}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


@pytest.mark.smoke
def test_a_seek_gives_the_same_batches(examples):
    whole = batches(examples, 9)  # 22 examples: several epochs
    for step in (1, 4, 8):
        assert_same(batches(examples, 1, start=step)[0], whole[step])


@pytest.mark.parametrize("parts", [[[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 1, 6], [2, 5], [3, 4, 7]]])
def test_processes_share_the_global_batch_row_for_row(examples, parts):
    whole = batches(examples, 4)
    for rows in map(np.array, parts):
        for step, part in zip((0, 3), (0, 3), strict=True):
            mine = batches(examples, 1, start=step, rows=rows)[0]
            assert_same(mine, {k: v[rows] for k, v in whole[part].items()})


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("rows", [np.arange(48), np.arange(1, 48, 2)], ids=["alone", "of two"])
def test_workers_and_processes_do_not_change_batches(examples, workers, rows):
    """Of three chunks each, which workers share unevenly."""
    mine = batches(examples, 4, start=2, rows=rows, workers=workers, batch_size=48)
    for step, batch in enumerate(mine, start=2):
        assert_same(batch, reference(examples, step, rows=rows, batch_size=48))


def small_example(reads, record, data, seed, position):
    """An example of 100 bytes; adds a byte to the file `reads`, from whatever process."""
    with open(reads, "ab") as file:
        file.write(b".")
    return {"x": np.full(99, position % 251, np.uint8)}


@pytest.mark.parametrize(
    "prefetch_bytes, workers, ahead",
    [
        (1, 0, 2 * 64),  # two batches at least
        (200 * 100, 0, 192),  # in chunks of 16
        (10**9, 0, batching.MOST_PREFETCHED),
        (640 * 100, 2, 640),  # what is on its way between the processes counts
    ],
)
def test_what_is_read_ahead_of_a_standing_consumer(
    examples, tmp_path, prefetch_bytes, workers, ahead
):
    """The example has 100 bytes with the mark of replaced ones."""
    reads = tmp_path / "reads"
    data = replace(examples.data, prefetch_bytes=prefetch_bytes, workers=workers)
    make = functools.partial(small_example, str(reads))
    stream = batching.train_batches(
        replace(examples, data=data, make=make), 64, rows=np.arange(64), start_step=0
    )
    with contextlib.closing(stream):
        for _ in range(2):
            next(stream)
        expected = 1 + 2 * 64 + ahead  # the first example tells its size
        until = time.monotonic() + 60
        while reads.stat().st_size < expected and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.3)
        assert reads.stat().st_size == expected


def test_a_batch_is_not_kept_while_the_next_is_filled(examples, monkeypatch):
    placed, alive, empty = [], [], batching._empty

    def counting(*args):
        alive.append(sum(batch() is not None for batch in placed))
        return empty(*args)

    monkeypatch.setattr(batching, "_empty", counting)
    stream = batching.train_batches(examples, 48, rows=np.arange(48), start_step=0)
    ahead = batching.ahead(stream, lambda batch: placed.append(weakref.ref(batch["image"])))
    with contextlib.closing(ahead):
        next(ahead)
    assert alive == [0, 0, 0]


def test_every_epoch_is_a_new_permutation_with_new_views_and_orders(examples):
    n = len(examples)
    stream = batching.train_batches(examples, n, rows=np.arange(n), start_step=0)
    with contextlib.closing(stream):
        first, second = next(stream), next(stream)
    assert not np.array_equal(first["order"], second["order"])
    assert {tuple(o) for o in first["order"]} <= {
        (a, b, c, d)
        for a in range(4) for b in range(4) for c in range(4) for d in range(4)
        if {a, b, c, d} == {0, 1, 2, 3}
    }  # fmt: skip
    assert not any(np.array_equal(x, y) for x in first["image"] for y in second["image"])
    assert len({tuple(examples(position, 0)["order"]) for position in range(20)}) > 5


def test_orders_hang_on_the_position_not_on_the_row(examples):
    whole = batches(examples, 2)
    half = replace(examples)
    stream = batching.train_batches(half, BATCH // 2, rows=np.arange(BATCH // 2), start_step=0)
    with contextlib.closing(stream):
        parts = [next(stream) for _ in range(4)]
    joined = {k: np.concatenate([p[k] for p in parts[:2]]) for k in parts[0]}
    assert_same(joined, whole[0])


def test_another_seed_gives_other_batches(examples):
    other = batches(replace(examples, seed=4), 1)[0]
    assert not np.array_equal(other["image"], batches(examples, 1)[0]["image"])


def test_raster_order(examples):
    raster = replace(examples, data=replace(examples.data, order="raster"))
    assert (batches(raster, 1)[0]["order"] == np.arange(4)).all()


def test_eval_batches_count_every_example_once(examples):
    def load(index):
        return {"index": np.int32(index)}

    seen = []
    for process in range(2):
        rows = np.arange(process, 8, 2)
        got = list(batching.eval_batches(load, 11, 8, rows=rows))
        assert [len(b["valid"]) for b in got] == [4, 4]
        seen += [i for b in got for i in b["index"][b["valid"]]]
    assert sorted(seen) == list(range(11))


def test_eval_batches_load_by_so_many_threads_and_keep_no_examples():
    together, alive = threading.Barrier(3, timeout=60), weakref.WeakValueDictionary()

    def load(index):
        if len(alive) and threading.current_thread() is not threading.main_thread():
            together.wait()  # until three threads are here
        example = np.full(3, index)
        alive[id(example)] = example
        return {"x": example}

    for batch in batching.eval_batches(load, 18, 9, rows=np.arange(9), threads=3):
        assert len(alive) <= 1
        assert batch["valid"].all()
