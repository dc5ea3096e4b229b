"""Fine-tuning: initial weights, and full runs."""

import dataclasses
import json
import shutil
import signal
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dgpt_jax
from dgpt_jax import train
from dgpt_jax.config import roots
from dgpt_jax.data import loader
from dgpt_jax.distributed import preemption, sharding
from dgpt_jax.errors import UserError
from dgpt_jax.evals import classification
from dgpt_jax.monitoring import metrics
from dgpt_jax.storage import orbax_checkpoint
from dgpt_jax.training import bad_step_replay, optimizer, tasks, train_step
from dgpt_jax.weights import api, export, mapping, registry
from tests.support.classifying import by_hand, settings
from tests.support.data import edit_metadata, image_dataset, random_teacher, tiny_model, token_store
from tests.training.loop_test import metrics_of, stop_after


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """24 images of two classes."""
    return image_dataset(tmp_path_factory.mktemp("classify"), per_class=12)


def one_step(task, batch, accum: int, number: int = 0):
    mesh = sharding.make_mesh(roots.MeshConfig())
    tx = optax.sgd(1.0)
    initial = train_step.init_state(task.init, tx, mesh, 0, task.initial_weights().params)
    initial = dataclasses.replace(initial, step=initial.step + number)
    step_fn = train_step.make_train_step(
        task.loss, tx, mesh, accum_steps=accum, prepare=task.prepare, seed=3
    )
    running = metrics.averages(task.metric_names).empty()
    placed = sharding.global_batch(mesh, 8, batch)
    return step_fn(initial, running, placed, {})


def test_microbatches_equal_the_batch(dataset):
    """With the same mixup, erasing and drop path, though neighbors are in other micro-batches."""
    task = tasks.open_task(settings(dataset))
    batch = next(loader.train_batches(task.examples, 8, rows=np.arange(8), start_step=0))
    assert {name: (x.shape[1:], x.dtype) for name, x in batch.items()} == {
        name: (x.shape, x.dtype) for name, x in task.abstract_example().items()
    }
    (state, running), (accumulated, accumulated_running) = (
        one_step(task, batch, accum) for accum in (1, 4)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        state.params, accumulated.params,
    )  # fmt: skip
    loss, grad = (float(running.compute()[name]) for name in ("loss", "grad_norm"))
    np.testing.assert_allclose(float(accumulated_running.compute()["loss"]), loss, rtol=1e-5)
    assert abs(loss - np.log(2)) < 0.01 and grad > 0  # the head is initialized near zero
    _, later = one_step(task, batch, 1, number=1)
    assert abs(float(later.compute()["grad_norm"]) - grad) > 1e-4 * grad  # another mixup


@pytest.fixture(scope="module")
def full_run(dataset, tmp_path_factory):
    """Work directory of an uninterrupted run of 6 steps."""
    workdir = tmp_path_factory.mktemp("full")
    assert train.train(settings(dataset), workdir) == 0
    return workdir


def test_an_interrupted_run_resumes_exactly(dataset, full_run, tmp_path, monkeypatch, capsys):
    run = settings(dataset)
    with monkeypatch.context() as patch:
        stop_after(patch, 2, signal.SIGTERM)
        assert train.train(run, tmp_path) == preemption.EXIT_PREEMPTED
    assert train.train(run, tmp_path) == 0
    for name in ("loss", "grad_norm", "learning_rate"):
        a, b = ([line[name] for line in metrics_of(d)] for d in (full_run, tmp_path))
        assert a == b and len(a) == 6
    a, b = (orbax_checkpoint.load_params(d, 6)[0] for d in (full_run, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    log = capsys.readouterr().err
    assert "val/top1: best " in log and "val/top1_squash: best " in log
    assert "val/top5" not in log  # always right with two classes
    assert f"next: python tools/convert.py {tmp_path} EXPORT --to=timm" in log
    with pytest.raises(UserError, match=r"config.classify.pooling is 'cls'.*--workdir"):
        train.train(settings(dataset, classify={"pooling": "cls"}), tmp_path)
    with pytest.raises(UserError, match=r"config.optim.ema is 0.0.*--workdir"):
        train.train(settings(dataset, optim={"ema": 0.0}), tmp_path, allow_config_change=True)


def test_the_moving_average_is_loaded(dataset, full_run):
    """Computed by hand from the parameters after each step."""
    run = settings(dataset)
    task = tasks.open_task(run)
    tx = task.optimizer(optimizer.schedule(0.05 * 8 / 256, 1, 6, 1e-5))
    mesh = sharding.make_mesh(run.mesh)
    current = train_step.init_state(task.init, tx, mesh, run.seed, task.initial_weights().params)
    step_fn = train_step.make_train_step(
        task.loss, tx, mesh, accum_steps=1, prepare=task.prepare, seed=run.seed
    )
    mean = jax.device_get(current.params)
    running = metrics.averages(task.metric_names).empty()
    batches = loader.train_batches(task.examples, 8, rows=np.arange(8), start_step=0)
    for _, batch in zip(range(6), batches, strict=False):
        batch = sharding.global_batch(mesh, 8, batch)
        current, running = step_fn(current, running, batch, {})
        after = jax.device_get(current.params)
        mean = jax.tree.map(lambda m, p: 0.8 * m + 0.2 * p, mean, after)
    batches.close()
    params, metadata = orbax_checkpoint.load_params(full_run, 6)
    assert metadata["format"] == 3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), params, mean)
    assert np.abs(params["head"]["kernel"] - after["head"]["kernel"]).max() > 1e-5


def test_accuracy_counts_every_example_once(dataset, full_run):
    params, _ = orbax_checkpoint.load_params(full_run, 6)
    measured = [json.loads(x) for x in (full_run / "metrics.jsonl").read_text().splitlines()]
    measured = [x for x in measured if "val/top1" in x]
    assert [x["step"] for x in measured] == [3, 6]
    for suffix, squash in (("", False), ("_squash", True)):
        logits, labels = by_hand(params, dataset, squash=squash)
        expected = (logits.argmax(axis=1) == labels).mean()
        assert measured[-1][f"val/top1{suffix}"] == pytest.approx(expected, abs=1e-9)


def test_non_finite_logits_are_refused(dataset):
    run = settings(dataset, evals={"batch_size": 24})
    task = tasks.open_task(run)
    evaluate = classification.accuracy(task, sharding.make_mesh(run.mesh))
    bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), task.init(jax.random.key(0)))
    with pytest.raises(UserError, match="train'.*24 of 24"):
        evaluate(bad)


def test_classify_refuses_a_token_store(dataset, tmp_path):
    store = token_store(tmp_path, dataset, random_teacher(tmp_path / "clip"))
    with pytest.raises(UserError, match=str(store)):
        tasks.open_task(settings(dataset, data={"path": str(store)}))


def resized_to(pixels: int, metadata: dict):
    metadata["config"]["classify"]["resize"] = pixels


def test_a_classifier_is_exported_with_its_head(dataset, full_run, tmp_path):
    _, weights = registry.read(full_run)
    assert (weights.pooling, weights.num_classes, weights.preprocess.crop_pct) == ("mean", 2, 0.875)
    other = shutil.copytree(full_run, tmp_path / "other")
    for resize, share in ((16, 1.0), (24, 16 / 24)):  # resize of the run's evaluation
        edit_metadata(other / "checkpoints/6", partial(resized_to, resize))
        assert registry.read(other)[1].preprocess.crop_pct == share
    export.write(weights, registry.LAYOUTS["timm"], tmp_path / "timm")
    _, again = registry.read(tmp_path / "timm")
    assert again.num_classes == 2 and again.pooling == "mean"
    logits, _ = by_hand(mapping.unflatten(again.params), dataset, squash=False)
    expected, _ = by_hand(orbax_checkpoint.load_params(full_run)[0], dataset, squash=False)
    np.testing.assert_array_equal(logits, expected)
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    encoder = dgpt_jax.load_encoder(full_run)
    assert encoder.features(images, "mean").shape == (2, 24)


@pytest.mark.slow
def test_a_dumped_step_is_replayed(dataset, tmp_path):
    run = settings(dataset, classify={"mixup": 0.0})
    task, mesh = tasks.open_task(run), sharding.make_mesh(run.mesh)
    local = next(loader.train_batches(task.examples, 8, rows=np.arange(8), start_step=4))
    ids = loader.batch_ids(task.examples, 8, rows=np.arange(8), step=4)
    params = jax.jit(task.init)(jax.random.key(0))
    replayed = bad_step_replay.replay(
        bad_step_replay.write(tmp_path, task, params, 4, ids, local, mesh)
    )
    assert replayed.ids == ids and replayed.step == 4 and not replayed.bad_examples()
    np.testing.assert_allclose(replayed.now["losses"]["loss"], replayed.before["losses"]["loss"])


def open_from(dataset, path, **changes):
    init = {"weights": str(path)} if path else {}
    return tasks.open_task(settings(dataset, init=init, **changes))


def test_initial_weights_of_a_classifier(dataset, full_run, tmp_path):
    """Norm and head are loaded only with the same pooling and classes."""
    encoder = api.untrained(tiny_model(), seed=5)
    export.write(
        registry.Weights(tiny_model(), mapping.flatten(encoder.params), "cls", "untrained"),
        registry.LAYOUTS["safetensors"], tmp_path / "a.safetensors",
    )  # fmt: skip
    task = open_from(dataset, tmp_path / "a.safetensors")
    assert set(task.initial_weights().params) == {"encoder", "pos_embed"}
    mesh = sharding.make_mesh(roots.MeshConfig())
    initial = train_step.init_state(
        task.init, task.optimizer(lambda _: 0.1), mesh, 0, task.initial_weights().params
    )
    jax.tree.map(
        np.testing.assert_array_equal, initial.params["encoder"], encoder.params["encoder"]
    )
    jax.tree.map(np.testing.assert_array_equal, optimizer.eval_params(initial), initial.params)
    np.testing.assert_array_equal(initial.params["pos_embed"], encoder.params["pos_embed"])
    assert np.all(initial.params["norm"]["scale"] == 1)
    assert 1e-6 < np.std(initial.params["head"]["kernel"]) < 4e-5
    assert set(open_from(dataset, full_run).initial_weights().params) == {
        "encoder",
        "pos_embed",
        "norm",
        "head",
    }
    random = tasks.open_task(settings(dataset)).initial_weights()
    assert set(random.params) == {"pos_embed"} and np.any(random.params["pos_embed"])
    larger = open_from(dataset, full_run, model={"image_size": 24}).initial_weights()
    assert larger.params["pos_embed"].shape == (1, 37, 24)
    assert any("4² to 6²" in note for note in larger.notes)
    old = orbax_checkpoint.load_params(full_run)[0]["pos_embed"]
    np.testing.assert_array_equal(larger.params["pos_embed"][:, 0], old[:, 0])
    torch = pytest.importorskip("torch")
    grid = torch.tensor(old[:, 1:].reshape(1, 4, 4, 24).transpose(0, 3, 1, 2).copy())
    grid = torch.nn.functional.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False)
    resized = grid.numpy().transpose(0, 2, 3, 1).reshape(1, 36, 24)
    np.testing.assert_allclose(larger.params["pos_embed"][:, 1:], resized, atol=1e-5)


def test_mismatches_are_user_errors(dataset, full_run):
    for changes, message in (
        ({"model": {"width": 48}}, r"width 24.* 48.*config.model.width=24"),
        ({"classify": {"num_classes": 3}}, " 2 classes.* 3"),
        ({"classify": {"resize": 15}}, "config.classify.resize.*15.*image_size.*16"),
    ):
        with pytest.raises(UserError, match=message):
            open_from(dataset, full_run, **changes).initial_weights()
    with pytest.raises(UserError, match="mixup_group_size.*3"):
        settings(dataset, classify={"mixup_group_size": 3})
    with pytest.raises(UserError, match="config.task=classify"):
        settings(dataset, task="pretrain", optim={"kind": "sgd"})
