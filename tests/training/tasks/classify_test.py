"""Fine-tuning: what it starts from, and whole runs."""

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
from dgpt_jax import (
    batching,
    checkpoint,
    config,
    load,
    metrics,
    optim,
    replay,
    sharding,
    signals,
    state,
    step,
    tasks,
    train,
)
from dgpt_jax.convert import export, formats, layout
from dgpt_jax.evals import classification
from dgpt_jax.schema import UserError
from tests.classifying import by_hand, settings
from tests.data import edit_metadata, image_dataset, random_teacher, tiny_model, token_store
from tests.train_test import metrics_of, stop_after


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """24 pictures of two classes."""
    return image_dataset(tmp_path_factory.mktemp("classify"), per_class=12)


def one_step(task, batch, accum: int, number: int = 0):
    mesh = sharding.make_mesh(config.Mesh())
    tx = optax.sgd(1.0)
    begun = state.create(task.init, tx, mesh, 0, task.given)
    begun = dataclasses.replace(begun, step=begun.step + number)
    step_fn = step.make_train_step(
        task.loss, tx, mesh, accum_steps=accum, prepare=task.prepare, seed=3
    )
    running = metrics.averages(task.metric_names).empty()
    placed = sharding.global_batch(mesh, 8, batch)
    return step_fn(begun, running, placed, {})


def test_micro_batches_are_the_batch(dataset):
    """Mixed, erased and dropped alike, though neighbours are in different micro-batches."""
    task = tasks.open_task(settings(dataset))
    batch = next(batching.train_batches(task.examples, 8, rows=np.arange(8), start_step=0))
    assert {name: (x.shape[1:], x.dtype) for name, x in batch.items()} == {
        name: (x.shape, x.dtype) for name, x in task.abstract_example().items()
    }
    (whole, seen), (parts, seen_parts) = (one_step(task, batch, accum) for accum in (1, 4))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        whole.params, parts.params,
    )  # fmt: skip
    loss, grad = (float(seen.compute()[name]) for name in ("loss", "grad_norm"))
    np.testing.assert_allclose(float(seen_parts.compute()["loss"]), loss, rtol=1e-5)
    assert abs(loss - np.log(2)) < 0.01 and grad > 0  # the head begins near zero
    _, later = one_step(task, batch, 1, number=1)
    assert abs(float(later.compute()["grad_norm"]) - grad) > 1e-4 * grad  # mixed in another way


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """The work directory of 6 steps in one go."""
    workdir = tmp_path_factory.mktemp("whole")
    assert train.train(settings(dataset), workdir) == 0
    return workdir


def test_a_stopped_run_goes_on_to_the_bit(dataset, whole, tmp_path, monkeypatch, capsys):
    run = settings(dataset)
    with monkeypatch.context() as patch:
        stop_after(patch, 2, signal.SIGTERM)
        assert train.train(run, tmp_path) == signals.EXIT_PREEMPTED
    assert train.train(run, tmp_path) == 0
    for name in ("loss", "grad_norm", "learning_rate"):
        a, b = ([line[name] for line in metrics_of(d)] for d in (whole, tmp_path))
        assert a == b and len(a) == 6
    a, b = (checkpoint.load_params(d, 6)[0] for d in (whole, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    said = capsys.readouterr().err
    assert "val/top1: best " in said and "val/top1_squash: best " in said
    assert "val/top5" not in said  # of two classes it is always right
    assert f"next: python tools/convert.py {tmp_path} DIR --to=timm" in said
    with pytest.raises(UserError, match=r"config.classify.pooling is 'cls'.*choose another"):
        train.train(settings(dataset, classify={"pooling": "cls"}), tmp_path)
    with pytest.raises(UserError, match=r"config.optim.ema is 0.0.*choose another"):
        train.train(settings(dataset, optim={"ema": 0.0}), tmp_path, allow_config_change=True)


def test_the_moving_average_is_what_is_read(dataset, whole):
    """By hand from the parameters after each step."""
    run = settings(dataset)
    task = tasks.open_task(run)
    tx = task.optimizer(optim.schedule(0.05 * 8 / 256, 1, 6, 1e-5))
    mesh = sharding.make_mesh(run.mesh)
    current = state.create(task.init, tx, mesh, run.seed, task.given)
    step_fn = step.make_train_step(
        task.loss, tx, mesh, accum_steps=1, prepare=task.prepare, seed=run.seed
    )
    mean = jax.device_get(current.params)
    running = metrics.averages(task.metric_names).empty()
    batches = batching.train_batches(task.examples, 8, rows=np.arange(8), start_step=0)
    for _, batch in zip(range(6), batches, strict=False):
        placed = sharding.global_batch(mesh, 8, batch)
        current, running = step_fn(current, running, placed, {})
        after = jax.device_get(current.params)
        mean = jax.tree.map(lambda m, p: 0.8 * m + 0.2 * p, mean, after)
    batches.close()
    read, metadata = checkpoint.load_params(whole, 6)
    assert metadata["format"] == 3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), read, mean)
    assert np.abs(read["head"]["kernel"] - after["head"]["kernel"]).max() > 1e-5


def test_accuracy_counts_every_example_once(dataset, whole):
    params, _ = checkpoint.load_params(whole, 6)
    measured = [json.loads(x) for x in (whole / "metrics.jsonl").read_text().splitlines()]
    measured = [x for x in measured if "val/top1" in x]
    assert [x["step"] for x in measured] == [3, 6]
    for suffix, squash in (("", False), ("_squash", True)):
        logits, labels = by_hand(params, dataset, squash=squash)
        expected = (logits.argmax(axis=1) == labels).mean()
        assert measured[-1][f"val/top1{suffix}"] == pytest.approx(expected, abs=1e-9)


def test_broken_numbers_are_refused(dataset):
    run = settings(dataset, evals={"batch_size": 24})
    task = tasks.open_task(run)
    evaluate = classification.accuracy(task, sharding.make_mesh(run.mesh))
    bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), task.init(jax.random.key(0)))
    with pytest.raises(UserError, match="train'.*: logits of 24 of 24 examples are not finite"):
        evaluate(bad)


def test_a_token_store_is_no_dataset_of_images(dataset, tmp_path):
    store = token_store(tmp_path, dataset, random_teacher(tmp_path / "clip"))
    with pytest.raises(UserError, match="classify needs an image dataset, and .* is a token store"):
        tasks.open_task(settings(dataset, data={"path": str(store)}))


def resized_to(pixels: int, metadata: dict):
    metadata["config"]["classify"]["resize"] = pixels


def test_a_classifier_is_exported_with_its_head(dataset, whole, tmp_path):
    _, weights = formats.read(whole)
    assert (weights.pooling, weights.num_classes, weights.preprocess.crop_pct) == ("mean", 2, 0.875)
    other = shutil.copytree(whole, tmp_path / "other")
    for resize, share in ((16, 1.0), (24, 16 / 24)):  # what a run was measured with
        edit_metadata(other / "checkpoints/6", partial(resized_to, resize))
        assert formats.read(other)[1].preprocess.crop_pct == share
    export.write(weights, formats.LAYOUTS["timm"], tmp_path / "timm")
    _, again = formats.read(tmp_path / "timm")
    assert again.num_classes == 2 and again.pooling == "mean"
    logits, _ = by_hand(layout.unflatten(again.params), dataset, squash=False)
    expected, _ = by_hand(checkpoint.load_params(whole)[0], dataset, squash=False)
    np.testing.assert_array_equal(logits, expected)
    pictures = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    encoder = dgpt_jax.load_encoder(whole)
    assert encoder.features(pictures, "mean").shape == (2, 24)


@pytest.mark.slow
def test_a_bad_step_is_run_again(dataset, tmp_path):
    run = settings(dataset, classify={"mixup": 0.0})
    task, mesh = tasks.open_task(run), sharding.make_mesh(run.mesh)
    local = next(batching.train_batches(task.examples, 8, rows=np.arange(8), start_step=4))
    ids = batching.batch_ids(task.examples, 8, rows=np.arange(8), step=4)
    params = jax.jit(task.init)(jax.random.key(0))
    found = replay.replay(replay.write(tmp_path, task, params, 4, ids, local, mesh))
    assert found.ids == ids and found.step == 4 and not found.bad_examples()
    np.testing.assert_allclose(found.now["losses"]["loss"], found.before["losses"]["loss"])


def started(dataset, path, **changes):
    classify = {"weights": str(path)} | changes.pop("classify", {})
    return tasks.open_task(settings(dataset, classify=classify, **changes))


def test_what_a_classifier_starts_from(dataset, whole, tmp_path):
    """An encoder that was pooled otherwise gets a fresh norm; a classifier's norm and head stay
    where they mean the same."""
    encoder = load.untrained(tiny_model(), seed=5)
    export.write(
        formats.Weights(tiny_model(), layout.flatten(encoder.params), "cls", "untrained"),
        formats.LAYOUTS["safetensors"], tmp_path / "a.safetensors",
    )  # fmt: skip
    task = started(dataset, tmp_path / "a.safetensors")
    assert set(task.given) == {"encoder", "pos_embed"}
    mesh = sharding.make_mesh(config.Mesh())
    begun = state.create(task.init, task.optimizer(lambda _: 0.1), mesh, 0, task.given)
    jax.tree.map(np.testing.assert_array_equal, begun.params["encoder"], encoder.params["encoder"])
    jax.tree.map(np.testing.assert_array_equal, optim.measured(begun), begun.params)
    np.testing.assert_array_equal(begun.params["pos_embed"], encoder.params["pos_embed"])
    assert np.all(begun.params["norm"]["scale"] == 1)
    assert 1e-6 < np.std(begun.params["head"]["kernel"]) < 4e-5
    assert set(started(dataset, whole).given) == {"encoder", "pos_embed", "norm", "head"}
    random = tasks.open_task(settings(dataset))
    assert set(random.given) == {"pos_embed"} and np.any(random.given["pos_embed"])
    larger = started(dataset, whole, model={"image_size": 24})
    assert larger.given["pos_embed"].shape == (1, 37, 24)
    assert any("resized from 4² to 6²" in note for note in larger.notes)
    old = checkpoint.load_params(whole)[0]["pos_embed"]
    np.testing.assert_array_equal(larger.given["pos_embed"][:, 0], old[:, 0])
    torch = pytest.importorskip("torch")
    grid = torch.tensor(old[:, 1:].reshape(1, 4, 4, 24).transpose(0, 3, 1, 2).copy())
    grid = torch.nn.functional.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False)
    resized = grid.numpy().transpose(0, 2, 3, 1).reshape(1, 36, 24)
    np.testing.assert_allclose(larger.given["pos_embed"][:, 1:], resized, atol=1e-5)


def test_what_does_not_fit(dataset, whole):
    for changes, message in (
        ({"model": {"width": 48}}, r"has width 24, the config 48: set config.model.width=24"),
        ({"classify": {"num_classes": 3}}, "has labels of 2 classes, the config expects 3"),
        ({"classify": {"resize": 15}}, "config.classify.resize 15 is smaller than .*image_size 16"),
    ):
        with pytest.raises(UserError, match=message):
            started(dataset, whole, **changes)
    with pytest.raises(UserError, match="mix_group 3 must be even and divide"):
        settings(dataset, classify={"mix_group": 3})
    with pytest.raises(UserError, match="are for config.task=classify"):
        settings(dataset, task="pretrain")
