"""Effective rank and view agreement: known values, any number of devices, in a pretraining run."""

import jax
import numpy as np
import pytest

from dgpt_jax.config import TrainConfig, schema
from dgpt_jax.distributed import sharding
from dgpt_jax.errors import UserError
from dgpt_jax.evals import label_free, pretraining
from dgpt_jax.evals.feature_bank import FeatureBank
from dgpt_jax.training import tasks
from tests.support import data
from tests.support.banks import mesh_of


def bank(rows, devices=1):
    mesh = mesh_of(devices)
    return FeatureBank.from_arrays(np.float32(rows), np.arange(len(rows)), mesh, batch_size=8)


def by_singular_values(rows):
    """RankMe's formula on a matrix."""
    values = np.linalg.svd(np.float64(rows), compute_uv=False)
    share = values / values.sum() + 1e-7
    return np.exp(-(share * np.log(share)).sum())


RNG = np.random.default_rng(0)
SPECTRUM = RNG.standard_normal((50, 12)) * 2.0 ** -np.arange(12)
ROWS = {
    "orthonormal": (np.tile(np.eye(6), (3, 1)), 6.0),
    "one direction": (np.outer(1 + RNG.random(40), np.ones(12)), 1.0),
    "zero": (np.zeros((10, 4)), 1.0),
    "decaying spectrum": (SPECTRUM, by_singular_values(SPECTRUM)),
    "fewer rows than columns": (SPECTRUM[:5], by_singular_values(SPECTRUM[:5])),
    "an offset counts": (SPECTRUM + 10, by_singular_values(SPECTRUM + 10)),
}


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("name", ROWS)
def test_effective_rank(name, devices):
    rows, expected = ROWS[name]
    assert label_free.effective_rank(bank(rows, devices)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("devices", [1, 4])
def test_view_agreement(devices):
    rows = RNG.standard_normal((43, 16))
    queries = bank(rows, devices)
    noisy = rows + 0.1 * RNG.standard_normal(rows.shape)
    assert label_free.view_agreement(queries, bank(3 * noisy, devices)) == 1
    assert label_free.view_agreement(queries, bank(np.roll(rows, 1, 0), devices)) == 0
    assert label_free.view_agreement(queries, bank(np.ones_like(rows), devices)) == 1 / 43
    swapped = np.concatenate([rows[1::-1], rows[2:]])
    assert label_free.view_agreement(queries, bank(swapped, devices)) == 41 / 43


def config(images, **evals):
    return schema.parse(
        TrainConfig,
        dict(
            total="4 steps", batch_size=8, dtype="float32", model=data.TINY,
            data={"path": str(images), "targets": "pixels", "threads": 2},
            optim={"warmup": "1 steps"}, loss={"visible": 0.0}, checkpoint={"every": "100%"},
            evals={"every": "2 steps", "heldout_split": "train", "batch_size": 8} | evals,
        ),
    )  # fmt: skip


def test_in_a_run(tmp_path):
    images = data.image_dataset(tmp_path, 12)
    run = config(images, heldout=str(images), label_free=20)
    task = tasks.open_task(run)
    evaluate = pretraining.label_free_quality(task, sharding.make_mesh(run.mesh))
    params = task.init(jax.random.key(0))
    values = evaluate(params)
    assert set(values) == set(pretraining.metric_names(task)) - {"heldout/next"}
    assert values == evaluate(params)
    assert all(1 <= values[f"rank/{p}"] <= run.model.width for p in ("cls", "mean"))
    assert 1 / 20 < values["agreement/mean"] <= 1
    broken = jax.tree.map(np.zeros_like, params)
    assert evaluate(broken)["agreement/mean"] == 1 / 20
    assert not any("label_free" in note for note in task.notes)
    run = config(images, heldout=str(images), label_free=2048)
    task = tasks.open_task(run)
    pretraining.label_free_quality(task, sharding.make_mesh(run.mesh))
    assert "there are 24 held-out images" in task.notes[-1] and task.notes[-1].endswith(" 0.042")
    assert "evaluate" in task.next_command

    views = label_free.TwoViews(*task.heldout(), flip=False)
    (pair, index), again = views.read(3), views.read(3)
    assert index == 3 and pair.shape == (2, 16, 16, 3) and (pair == again[0]).all()
    assert (pair[0] != pair[1]).any()


def test_without_held_out_images_it_is_refused():
    task = tasks.task_without_data(config("x", label_free=20))
    with pytest.raises(UserError, match=r"set config\.evals\.heldout"):
        pretraining.label_free_quality(task, sharding.make_mesh(task.config.mesh))
