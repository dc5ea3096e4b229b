"""Replay of a dumped step: its numbers, rows, and memory."""

import json
import shutil
from functools import partial

import jax
import numpy as np
import pytest

from dgpt_jax.config import MeshConfig, TrainConfig, schema
from dgpt_jax.data.token_codec import Codec
from dgpt_jax.distributed import sharding
from dgpt_jax.errors import UserError
from dgpt_jax.planning import plan
from dgpt_jax.training import (
    bad_step_measurement,
    bad_step_replay,
    initial_weights,
    tasks,
    train_step,
)
from dgpt_jax.training.tasks.pretrain import PretrainTask
from dgpt_jax.training.tasks.probes import ProbeTask
from dgpt_jax.training.tasks.targets import Target
from tests.support import data, processes
from tests.support.classifying import untrained
from tests.support.paths import GOLDEN

BATCH, NUMBER = 32, 3
SMALL = data.TINY | {"depth": 1, "taps": (1,), "decoder_depth": 1}
CLASSIFY = {
    "classify": {
        "num_classes": 2,
        "mixup_group_size": 8,
        "drop_path": 0.3,
        "random_erase_prob": 0.5,
    },
    "optim": {"layer_decay": 0.8},
}  # everything that uses the key of the step
PROBE = {
    "classify": {"num_classes": 2, "mixup": 0.0, "cutmix": 0.0, "trainable": "head"},
    "optim": {"kind": "lars", "layer_decay": 1.0},
}


def settings(task: str = "pretrain", **changes) -> TrainConfig:
    base = {"batch_size": BATCH, "dtype": "float32", "model": SMALL, "data": {"path": "x"}}
    task_fields = CLASSIFY if task == "classify" else {}
    return schema.parse(TrainConfig, base | {"task": task} | task_fields | changes)


def task_of(config: TrainConfig):
    """The task without data; tokens are int8 with a scale per channel."""
    if config.task == "classify":
        return tasks.task_without_data(config)
    codec = Codec("int8", np.linspace(0.1, 3, 24, dtype=np.float32))
    return PretrainTask(config, {"": Target(24, (4, 4), True, codec)})


def random_batch(task) -> dict[str, np.ndarray]:
    rng, batch = np.random.default_rng(0), {}
    for name, x in task.abstract_example().items():
        shape = (task.config.batch_size, *x.shape)
        if name == "order":
            batch[name] = rng.permuted(np.tile(np.arange(4), (shape[0], 1)), axis=1)
        else:
            batch[name] = rng.integers(0, 2 if name == "label" else 9, shape)
        batch[name] = batch[name].astype(x.dtype)
    return batch


def dump(directory, task, devices: int = 1, params=None):
    """(directory of the dumped step, its parameters, its batch)."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
    params = params or jax.jit(task.init)(jax.random.key(1))
    batch = random_batch(task)
    params = jax.device_put(params, sharding.shard_state(mesh, params))
    ids = [f"train/{row}" for row in range(BATCH)]
    return bad_step_replay.write(directory, task, params, NUMBER, ids, batch, mesh), params, batch


def unsplit(task, params, batch) -> dict:
    """Result of `measure` without micro-batches, on one device."""

    @jax.jit
    def run(params, batch):
        if task.prepare is not None:
            batch = task.prepare(train_step.step_key(task.config.seed, NUMBER), batch)
        (loss, losses), grads = jax.value_and_grad(task.loss, has_aux=True)(params, {}, batch)
        norms = {
            "params": bad_step_measurement.layer_norms(params),
            "grads": bad_step_measurement.layer_norms(grads),
        }
        return {"loss": loss, "losses": losses} | norms

    return jax.device_get(run(jax.device_get(params), batch))


def assert_same(measured: dict, expected: dict):
    for name in ("loss", "losses", "params", "grads"):
        assert jax.tree.structure(expected[name]) == jax.tree.structure(
            jax.tree.map(np.asarray, measured[name], is_leaf=lambda x: isinstance(x, list))
        )
        for path, x in jax.tree.leaves_with_path(expected[name]):
            y = measured[name]
            for key in path:
                y = y[key.key]
            np.testing.assert_allclose(y, x, rtol=1e-4, err_msg=f"{name} {path}")


# Devices and accum_steps.
SPLITS = {"pretrain": [(1, 1), (1, 4), (8, 2), (8, 8)], "classify": [(1, 2), (8, 1), (8, 4)]}


def check_layouts(directory, task: str):
    """In the run and on one device, results equal the unsplit computation, example by example."""
    loss = {"loss": {"visible": 0.0}} if task == "pretrain" else {}  # halves compile time
    expected, params = None, None
    for devices, accum_steps in SPLITS[task]:
        run = task_of(settings(task, accum_steps=accum_steps, **loss))
        path, *inputs = dump(f"{directory}/{devices}_{accum_steps}", run, devices, params)
        expected, params = expected or unsplit(run, *inputs), jax.device_get(inputs[0])
        replayed = bad_step_replay.replay(path)
        assert replayed.before["batch_shards"] == devices
        assert_same(replayed.before, expected)
        assert_same(replayed.now, expected)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["pretrain", "classify"])
def test_splits_equal_the_unsplit_computation(tmp_path, task):
    processes.on_devices(8, check_layouts, str(tmp_path), task)


def rows_of_microbatches(monkeypatch) -> list[int]:
    """A list that grows by the size of each batch that is transferred to devices."""
    rows, global_batch = [], sharding.global_batch

    def counting(mesh, size, local):
        rows.append(size)
        return global_batch(mesh, size, local)

    monkeypatch.setattr(sharding, "global_batch", counting)
    return rows


def as_of_devices(path, devices: int):
    """Edits a dump to be of a run on so many devices."""
    metadata = json.loads((path / "step.json").read_text())
    (path / "step.json").write_text(json.dumps(metadata | {"batch_shards": devices}))


@pytest.mark.slow
def test_a_microbatch_has_the_size_of_one_device(tmp_path, monkeypatch):
    path, _, _ = dump(tmp_path, task_of(settings(accum_steps=4)))
    as_of_devices(path, 2)
    for rows, expected in ((None, [4] * 8), (slice(1, 12), [4, 4, 3])):
        sizes = rows_of_microbatches(monkeypatch)
        bad_step_replay.replay(path, rows=rows)
        assert sizes == expected


@pytest.mark.parametrize("task", ["pretrain", pytest.param("classify", marks=pytest.mark.slow)])
def test_replay_of_selected_rows(tmp_path, task):
    """Losses are those within the full batch, also if mixed with other rows of it."""
    path, _, _ = dump(tmp_path, task_of(settings(task, accum_steps=2)))
    replayed = bad_step_replay.replay(path, rows=slice(5, 12))
    assert replayed.ids == [f"train/{row}" for row in range(5, 12)]
    assert replayed.batch_size == BATCH
    total = 0
    for name, losses in replayed.now["losses"].items():
        np.testing.assert_allclose(losses, replayed.before["losses"][name][5:12], rtol=1e-5)
        total += np.mean(losses)
    assert replayed.now["loss"] == pytest.approx(total, rel=1e-5)


def test_batch_norm_uses_the_microbatches_of_the_run(tmp_path):
    """Examples of a probe depend on others of their micro-batch."""
    weights = untrained(tmp_path / "a.safetensors", "mean")
    changes = PROBE | {"init": {"weights": str(weights)}, "model": data.TINY, "accum_steps": 2}
    changes |= {"task": "classify", "batch_size": BATCH, "dtype": "float32"}
    config = schema.parse(TrainConfig, {"data": {"path": "x"}} | changes)
    task = ProbeTask(config, read_weights=partial(initial_weights.for_classifier, config))
    path, _, _ = dump(tmp_path, task)
    as_of_devices(path, 4)
    replayed = bad_step_replay.replay(path)
    for name in ("losses", "grads"):
        for key, values in replayed.before[name].items():
            np.testing.assert_allclose(replayed.now[name][key], values, rtol=1e-5)
    with pytest.raises(UserError, match="config.classify.head=linear.* 32 rows"):
        bad_step_replay.replay(path, rows=slice(0, 4))


def test_rows_of_processes_are_reordered(tmp_path):
    """Processes hold interleaved rows, and some rows are in several files."""
    path, _, _ = dump(tmp_path, task_of(settings("classify")))
    with np.load(path / "batch_0000.npz") as file:
        arrays = dict(file)
    for process, rows in enumerate((np.arange(0, 32, 2), np.arange(1, 32, 2), np.arange(8))):
        selected = {name: x[rows] for name, x in arrays.items()}
        np.savez(path / f"batch_{process:04d}.npz", **selected)
    replayed = bad_step_replay.replay(path)
    assert replayed.ids == [f"train/{row}" for row in range(BATCH)]
    np.testing.assert_allclose(
        replayed.now["losses"]["loss"], replayed.before["losses"]["loss"], rtol=1e-5
    )


@pytest.mark.slow
def test_a_dump_of_an_older_version(tmp_path):
    """Tokens are float32, without codec and row numbers; also if two processes have written it."""
    replayed = bad_step_replay.replay(GOLDEN / "bad_step_float32")
    assert replayed.now["loss"] == pytest.approx(replayed.before["loss"], rel=1e-5)
    assert len(replayed.ids) == 4
    shutil.copytree(GOLDEN / "bad_step_float32", tmp_path / "two")
    with np.load(tmp_path / "two/batch_0000.npz") as file:
        arrays = dict(file)
    for process, rows in enumerate((slice(0, 2), slice(2, 4))):
        selected = {name: x[rows] for name, x in arrays.items()}
        np.savez(tmp_path / f"two/batch_{process:04d}.npz", **selected)
    two = bad_step_replay.replay(tmp_path / "two")
    assert two.ids == replayed.ids
    np.testing.assert_allclose(two.now["losses"]["next"], replayed.now["losses"]["next"], rtol=1e-5)


def test_tokens_are_dumped_as_stored(tmp_path):
    path, _, batch = dump(tmp_path, task_of(settings()))
    with np.load(path / "batch_0000.npz") as file:
        assert file["tokens"].dtype == np.int8
        np.testing.assert_array_equal(file["tokens"], batch["tokens"])


@pytest.mark.slow
def test_memory_is_that_of_the_train_step():
    """With 16 micro-batches; compiled, not run."""
    config = settings(accum_steps=16, batch_size=256)
    task, mesh = task_of(config), sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    lowered, state, batch = plan.lower(config, task, mesh)
    microbatch = {n: jax.ShapeDtypeStruct((16, *x.shape[1:]), x.dtype) for n, x in batch.items()}
    scalar, params = jax.ShapeDtypeStruct((), np.float32), state.params
    add = bad_step_measurement.accumulator(task, mesh, params)
    add = add.lower((scalar, params), params, {}, microbatch, scalar)
    ours, steps = (x.compile().memory_analysis() for x in (add, lowered))
    assert ours.temp_size_in_bytes <= 1.5 * steps.temp_size_in_bytes
    assert ours.argument_size_in_bytes <= steps.argument_size_in_bytes
