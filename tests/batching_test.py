"""The batch is a function of (seed, step): from any start, for any processes and workers."""

import contextlib
from dataclasses import replace

import numpy as np
import pytest

from dgpt_jax import batching, pipeline
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


def batches(examples, count, *, start=0, rows=ALL, workers=0):
    examples = replace(examples, data=replace(examples.data, workers=workers, threads=2))
    stream = batching.train_batches(examples, BATCH, rows=rows, start_step=start)
    with contextlib.closing(stream):
        return [next(stream) for _ in range(count)]


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


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_batches(examples, workers):
    whole = batches(examples, 4)
    for mine, expected in zip(batches(examples, 4, workers=workers), whole, strict=True):
        assert_same(mine, expected)


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
