"""The batch is a function of (seed, step): from any start, for any processes and workers."""

import contextlib
import functools
import threading
import time
import weakref
from dataclasses import replace

import numpy as np
import pytest

from dgpt_jax.config import DataConfig
from dgpt_jax.config.schema import parse
from dgpt_jax.data import dataset, loader, samplers
from tests.support.data import image_dataset, tiny_model

BATCH = 8
ALL = np.arange(BATCH)


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    path = image_dataset(tmp_path_factory.mktemp("batching"), per_class=11)
    data = parse(DataConfig, {"path": str(path), "targets": "pixels"})
    return dataset.open_examples(data, tiny_model(), seed=3)


def batches(examples, count, *, start=0, rows=ALL, workers=0, batch_size=BATCH):
    examples = replace(examples, data=replace(examples.data, workers=workers, threads=2))
    stream = loader.train_batches(examples, batch_size, rows=rows, start_step=start)
    with contextlib.closing(stream):
        return [next(stream) for _ in range(count)]


def reference(examples, step, *, rows, batch_size):
    """The batch, read one example at a time."""
    order = samplers.GlobalShuffleSampler(len(examples), examples.seed)
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
def test_starting_at_a_step_gives_the_same_batches(examples):
    expected = batches(examples, 9)  # 22 examples: several epochs
    for step in (1, 4, 8):
        assert_same(batches(examples, 1, start=step)[0], expected[step])


@pytest.mark.parametrize("row_sets", [[[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 1, 6], [2, 5], [3, 4, 7]]])
def test_processes_read_their_rows_of_the_global_batch(examples, row_sets):
    expected = batches(examples, 4)
    for rows in map(np.array, row_sets):
        for step, index in zip((0, 3), (0, 3), strict=True):
            local = batches(examples, 1, start=step, rows=rows)[0]
            assert_same(local, {k: v[rows] for k, v in expected[index].items()})


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("rows", [np.arange(48), np.arange(1, 48, 2)], ids=["alone", "of two"])
def test_workers_and_processes_do_not_change_batches(examples, workers, rows):
    """Batches of three chunks, which are divided unevenly among workers."""
    local = batches(examples, 4, start=2, rows=rows, workers=workers, batch_size=48)
    for step, batch in enumerate(local, start=2):
        assert_same(batch, reference(examples, step, rows=rows, batch_size=48))


def small_example(reads, record, data, seed, position):
    """An example of 99 bytes; appends a byte to the file `reads`, from any process."""
    with open(reads, "ab") as file:
        file.write(b".")
    return {"x": np.full(99, position % 251, np.uint8)}


@pytest.mark.parametrize(
    "prefetch_bytes, workers, ahead",
    [
        (1, 0, 2 * 64),  # at least two batches
        (200 * 100, 0, 192),  # in chunks of 16
        (10**9, 0, loader.MAX_PREFETCHED),
        (640 * 100, 2, 640),  # includes those in transfer between processes
    ],
)
def test_prefetched_examples_while_the_consumer_waits(
    examples, tmp_path, prefetch_bytes, workers, ahead
):
    """An example has 100 bytes, `replaced` included."""
    reads = tmp_path / "reads"
    data = replace(examples.data, prefetch_bytes=prefetch_bytes, workers=workers)
    transform = functools.partial(small_example, str(reads))
    stream = loader.train_batches(
        replace(examples, data=data, transform=transform), 64, rows=np.arange(64), start_step=0
    )
    with contextlib.closing(stream):
        for _ in range(2):
            next(stream)
        expected = 1 + 2 * 64 + ahead  # the first example is read once more, for its size
        until = time.monotonic() + 60
        while reads.stat().st_size < expected and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.3)
        assert reads.stat().st_size == expected


def test_a_batch_is_freed_before_the_next_is_filled(examples, monkeypatch):
    references, alive, empty = [], [], loader._empty

    def counting(*args):
        alive.append(sum(batch() is not None for batch in references))
        return empty(*args)

    monkeypatch.setattr(loader, "_empty", counting)
    stream = loader.train_batches(examples, 48, rows=np.arange(48), start_step=0)
    ahead = loader.prefetch_to_device(
        stream, lambda batch: references.append(weakref.ref(batch["image"]))
    )
    with contextlib.closing(ahead):
        next(ahead)
    assert alive == [0, 0, 0]


def test_epochs_have_new_permutations_views_and_orders(examples):
    n = len(examples)
    stream = loader.train_batches(examples, n, rows=np.arange(n), start_step=0)
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


def test_orders_depend_on_the_position_not_the_row(examples):
    expected = batches(examples, 2)
    half = replace(examples)
    stream = loader.train_batches(half, BATCH // 2, rows=np.arange(BATCH // 2), start_step=0)
    with contextlib.closing(stream):
        halves = [next(stream) for _ in range(4)]
    joined = {k: np.concatenate([p[k] for p in halves[:2]]) for k in halves[0]}
    assert_same(joined, expected[0])


def test_another_seed_gives_other_batches(examples):
    other = batches(replace(examples, seed=4), 1)[0]
    assert not np.array_equal(other["image"], batches(examples, 1)[0]["image"])


def test_raster_order(examples):
    raster = replace(examples, data=replace(examples.data, order="raster"))
    assert (batches(raster, 1)[0]["order"] == np.arange(4)).all()


def test_eval_batches_cover_every_example_once(examples):
    def load(index):
        return {"index": np.int32(index)}

    indices = []
    for process in range(2):
        rows = np.arange(process, 8, 2)
        got = list(loader.eval_batches(load, 11, 8, rows=rows))
        assert [len(b["valid"]) for b in got] == [4, 4]
        indices += [i for b in got for i in b["index"][b["valid"]]]
    assert sorted(indices) == list(range(11))


def test_eval_batches_use_all_threads_and_keep_no_examples():
    together, alive = threading.Barrier(3, timeout=60), weakref.WeakValueDictionary()

    def load(index):
        if len(alive) and threading.current_thread() is not threading.main_thread():
            together.wait()  # until three threads have arrived
        example = np.full(3, index)
        alive[id(example)] = example
        return {"x": example}

    for batch in loader.eval_batches(load, 18, 9, rows=np.arange(9), threads=3):
        assert len(alive) <= 1
        assert batch["valid"].all()
