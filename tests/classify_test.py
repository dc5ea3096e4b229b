"""Fine-tuning: layer decay, stochastic depth, what it starts from, and whole runs."""

import dataclasses
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dgpt_jax
from dgpt_jax import (
    checkpoint,
    config,
    heads,
    load,
    metrics,
    optim,
    param_rules,
    pipeline,
    records,
    replay,
    schema,
    sharding,
    signals,
    state,
    step,
    tasks,
    train,
    views,
    vit,
)
from dgpt_jax.convert import export, formats, layout
from dgpt_jax.convert.weights import encoder_shapes
from dgpt_jax.evals import classification
from dgpt_jax.schema import UserError
from tests.data import TINY, image_dataset, tiny_model
from tests.train_test import metrics_of, stop_after


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """24 pictures of two classes."""
    return image_dataset(tmp_path_factory.mktemp("classify"), per_class=12)


def settings(path, **changes) -> config.Train:
    defaults = dict(
        task="classify",
        total="6 steps",
        batch_size=8,
        dtype="float32",
        log_every=1,
        model=TINY,
        data={"path": str(path), "threads": 2, "crop_scale": (0.3, 1.0)},
        classify={"num_classes": 2, "mix_group": 4, "drop_path": 0.3},
        optim={"blr": 0.05, "warmup": "1 steps", "layer_decay": 0.7, "min_lr": 1e-5, "ema": 0.8},
        evals={
            "heldout": str(path),
            "heldout_split": "train",
            "every": "3 steps",
            "batch_size": 10,
        },
        checkpoint={"every": "100%", "best": "val/top1"},
    )
    for name, value in changes.items():
        both = isinstance(value, dict) and name in defaults
        defaults[name] = defaults[name] | value if both else value
    return schema.parse(config.Train, defaults)


def test_layer_decay_leaf_by_leaf():
    """decay^(L+1-i): 0 before the blocks, block i of 1 to L, the last norm and the head."""
    depth, decay = 3, 0.7
    tx = optim.scaled_by_layer(optim.layer_ids(depth), decay)
    shapes = encoder_shapes(tiny_model(), "mean", 2)
    ones = layout.unflatten({path: np.ones(shape, np.float32) for path, shape in shapes.items()})
    updates, _ = jax.jit(lambda ones: tx.update(ones, tx.init(ones)))(ones)
    for key_path, update in jax.tree_util.tree_leaves_with_path(updates):
        path = param_rules.path_of(key_path)
        if path.startswith("encoder/blocks/"):
            assert update.shape[0] == depth
            expected = np.broadcast_to(
                np.reshape([decay**3, decay**2, decay], (3, *(1,) * (update.ndim - 1))),
                update.shape,
            )
        elif path.startswith(("norm/", "head/")):
            expected = np.ones(update.shape)
        else:
            assert path.startswith(("encoder/patch_embed/", "encoder/cls_token", "pos_embed"))
            expected = np.full(update.shape, decay**4)
        np.testing.assert_allclose(update, expected, rtol=1e-6, err_msg=path)
    with pytest.raises(ValueError, match="no rule covers"):
        tx.update({"other": jnp.ones(2)}, tx.init({}))


def test_the_optimizer_is_adamw_a_layer():
    """Against optax.adamw with the rate of each layer, decay on matrices alone."""
    rng = np.random.default_rng(0)
    params = {
        "encoder": {"blocks": {"k": {"kernel": rng.standard_normal((3, 4, 5)),
                                     "bias": rng.standard_normal((3, 5))}},
                    "cls_token": rng.standard_normal((1, 1, 5))},
        "pos_embed": rng.standard_normal((1, 6, 5)),
        "head": {"kernel": rng.standard_normal((5, 2))},
    }  # fmt: skip
    params = jax.tree.map(jnp.float32, params)
    grads = jax.tree.map(lambda x: jnp.float32(rng.standard_normal(x.shape)), params)
    tx = tasks.planned(
        settings("x", optim={"b1": 0.9, "b2": 0.999, "weight_decay": 0.3})
    ).optimizer(lambda _: 0.1)
    updates, _ = jax.jit(
        lambda grads, params: tx.update(grads, tx.init(params), params, value=jnp.ones(()))
    )(grads, params)

    @jax.jit
    def alone(rate, weight_decay, value, grad):
        one = optax.adamw(rate, b1=0.9, b2=0.999, weight_decay=weight_decay)
        return one.update(grad, one.init(value), value)[0]

    blocks, told_grads = params["encoder"]["blocks"]["k"], grads["encoder"]["blocks"]["k"]
    found = updates["encoder"]["blocks"]["k"]
    for i in range(3):
        for name, decay in (("kernel", 0.3), ("bias", 0.0)):
            expected = alone(0.1 * 0.7 ** (3 - i), decay, blocks[name][i], told_grads[name][i])
            np.testing.assert_allclose(found[name][i], expected, rtol=1e-5, atol=1e-7)
    for path in (("pos_embed",), ("encoder", "cls_token")):
        value, grad, made = params, grads, updates
        for name in path:
            value, grad, made = value[name], grad[name], made[name]
        expected = alone(0.1 * 0.7**4, 0.0, value, grad)
        np.testing.assert_allclose(made, expected, rtol=1e-5, atol=1e-7)
    expected = alone(0.1, 0.3, params["head"]["kernel"], grads["head"]["kernel"])
    np.testing.assert_allclose(updates["head"]["kernel"], expected, rtol=1e-5, atol=1e-7)


def test_the_schedule_ends_at_the_least_rate():
    rate = optim.schedule(1e-3, 10, 100, 1e-6)
    assert float(rate(0)) == 0 and float(rate(5)) == pytest.approx(5e-4)
    assert float(rate(10)) == pytest.approx(1e-3) and float(rate(100)) == pytest.approx(1e-6)
    assert float(rate(55)) == pytest.approx((1e-3 + 1e-6) / 2)


def test_how_often_paths_are_dropped():
    paths = np.asarray(vit.drop_paths(jax.random.key(0), 20_000, 5, 0.4))
    assert paths.shape == (20_000, 5, 2)
    for block, rate in enumerate((0, 0.1, 0.2, 0.3, 0.4)):
        values = np.unique(paths[:, block])
        np.testing.assert_allclose(values, [0, 1 / (1 - rate)] if rate else [1], rtol=1e-6)
        assert abs((paths[:, block] == 0).mean() - rate) < 0.012
    assert abs(paths.mean() - 1) < 0.01
    both = (paths[:, -1] == 0).all(axis=1).mean()
    assert abs(both - 0.16) < 0.015  # the two branches are drawn apart


def test_dropped_paths_leave_a_block_out():
    """An example without its second block is one of an encoder without that block."""
    model = tiny_model(remat="full")
    whole = heads.classifier(model, "mean", 2)
    images = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
    params = jax.jit(whole.init)(jax.random.key(0), images)["params"]
    params["head"]["kernel"] = np.random.default_rng(1).standard_normal((24, 2))
    paths = np.ones((3, 2, 2), np.float32)
    paths[1, 0] = 0
    made = jax.jit(whole.apply)({"params": params}, images, paths)
    shorter = heads.classifier(tiny_model(depth=2), "mean", 2)
    blocks = jax.tree.map(lambda x: x[jnp.array([0, 2])], params["encoder"]["blocks"])
    without = params | {"encoder": params["encoder"] | {"blocks": blocks}}
    expected = jax.jit(shorter.apply)({"params": without}, images[:1])
    np.testing.assert_allclose(made[:1], expected, rtol=1e-4, atol=1e-5)
    plain = jax.jit(whole.apply)({"params": params}, images)
    np.testing.assert_allclose(made[1:], plain[1:], rtol=1e-4, atol=1e-5)
    assert np.abs(made[0] - plain[0]).max() > 1e-3


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
    batch = next(pipeline.train_batches(task.examples, 8, rows=np.arange(8), start_step=0))
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
    assert "val/top1: best " in said and "val/top5_squash: best 1.0000" in said
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
    batches = pipeline.train_batches(task.examples, 8, rows=np.arange(8), start_step=0)
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


def by_hand(encoder_params, dataset, *, squash: bool):
    """Logits and labels of all examples, one by one."""
    module = heads.classifier(tiny_model(), "mean", 2)
    source = records.Split(dataset, "train")
    crops = [
        views.centre_crop(views.decode_picture(r["image"]), 18, 16, squash=squash) for r in source
    ]
    logits = jax.jit(module.apply)({"params": encoder_params}, vit.normalise(np.stack(crops)))
    return np.asarray(logits), np.array([r["label"] for r in source])


def test_accuracy_counts_every_example_once(dataset, whole):
    params, _ = checkpoint.load_params(whole, 6)
    measured = [json.loads(x) for x in (whole / "metrics.jsonl").read_text().splitlines()]
    measured = [x for x in measured if "val/top1" in x]
    assert [x["step"] for x in measured] == [3, 6]
    for suffix, squash in (("", False), ("_squash", True)):
        logits, labels = by_hand(params, dataset, squash=squash)
        expected = (logits.argmax(axis=1) == labels).mean()
        assert measured[-1][f"val/top1{suffix}"] == pytest.approx(expected, abs=1e-9)


def test_broken_numbers_are_never_right(dataset):
    run = settings(dataset, evals={"batch_size": 24})
    task = tasks.open_task(run)
    evaluate = classification.accuracy(task, sharding.make_mesh(run.mesh))
    bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), task.init(jax.random.key(0)))
    assert evaluate(bad)["val/top1"] == 0


def test_a_classifier_is_exported_with_its_head(dataset, whole, tmp_path):
    _, weights = formats.read(whole)
    assert (weights.pooling, weights.num_classes, weights.preprocess.crop_pct) == ("mean", 2, 0.875)
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
    local = next(pipeline.train_batches(task.examples, 8, rows=np.arange(8), start_step=4))
    ids = pipeline.batch_ids(task.examples, 8, rows=np.arange(8), step=4)
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
    ):
        with pytest.raises(UserError, match=message):
            started(dataset, whole, **changes)
    with pytest.raises(UserError, match="mix_group 3 must be even and divide"):
        settings(dataset, classify={"mix_group": 3})
    with pytest.raises(UserError, match="are for config.task=classify"):
        settings(dataset, task="pretrain")


def probe_settings(dataset, weights, **changes) -> config.Train:
    """MAE's linear probe."""
    plain = {"mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0, "erase": 0.0, "smoothing": 0.0,
             "randaugment": "", "train": "head", "weights": str(weights)}  # fmt: skip
    optim = {"kind": "lars", "layer_decay": 1.0, "weight_decay": 0.0, "ema": 0.0, "blr": 32.0}
    return settings(dataset, classify=plain, optim=optim | changes)


def test_lars_is_maes():
    """Two steps by hand, with a rate that changes; biases are not scaled."""
    rng = np.random.default_rng(0)
    value, bias = rng.standard_normal((4, 3)), rng.standard_normal(3)
    rates, decay, momentum, trust = (0.3, 0.2), 0.01, 0.9, 0.001
    told = config.Optim(kind="lars", weight_decay=decay, b1=momentum)
    tx = optim.optimizer(told, lambda step: jnp.array(rates)[step], running=True)
    params = {"head": {"kernel": jnp.float32(value), "bias": jnp.float32(bias)},
              "running_mean": jnp.ones(3)}  # fmt: skip
    opt_state, gathered, gathered_bias = tx.init(params), 0.0, 0.0
    for rate in rates:
        grads = jax.tree.map(lambda x: jnp.float32(rng.standard_normal(x.shape)), params)
        mean = np.asarray(params["running_mean"]) - 0.1 * np.asarray(grads["running_mean"])
        updates, opt_state = tx.update(grads, opt_state, params, value=jnp.ones(()))
        params = optax.apply_updates(params, updates)
        grad = np.float64(grads["head"]["kernel"]) + decay * value
        grad *= trust * np.linalg.norm(value) / np.linalg.norm(grad)
        gathered = momentum * gathered + grad
        gathered_bias = momentum * gathered_bias + np.float64(grads["head"]["bias"])
        value, bias = value - rate * gathered, bias - rate * gathered_bias
        np.testing.assert_allclose(params["head"]["kernel"], value, rtol=1e-5)
        np.testing.assert_allclose(params["head"]["bias"], bias, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(params["running_mean"], mean, rtol=1e-5)


def test_batch_norm_is_torchs():
    """Logits in training and use, and running statistics after two steps."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    norm = torch.nn.BatchNorm1d(5, affine=False, eps=1e-6)
    module = heads.LinearProbe(5, 2)
    params = module.init(jax.random.key(0), np.zeros((1, 5), np.float32))["params"]
    kernel = np.asarray(params["head"]["kernel"])
    for _ in range(2):
        features = (rng.standard_normal((7, 5)) * 3 + 1).astype(np.float32)

        def loss(params, features=features):
            logits, gap = module.apply({"params": params}, features, method="train")
            return gap, (logits, gap)

        grads, (logits, gap) = jax.grad(loss, has_aux=True)(params)
        assert float(gap) == 0 and not np.any(grads["head"]["kernel"])
        expected = norm(torch.tensor(features)).numpy() @ kernel
        np.testing.assert_allclose(logits, expected, atol=1e-5)
        for name in ("running_mean", "running_var"):
            params[name] = params[name] - 0.1 * grads[name]
            np.testing.assert_allclose(params[name], getattr(norm, name).numpy(), rtol=1e-5)
    norm.eval()
    used = module.apply({"params": params}, features)
    np.testing.assert_allclose(used, norm(torch.tensor(features)).numpy() @ kernel, atol=1e-5)
    folded = heads.fold(jax.tree.map(np.asarray, params))
    np.testing.assert_allclose(used, features @ folded["kernel"] + folded["bias"], atol=1e-5)


def test_a_linear_probe(dataset, whole, tmp_path):
    """The encoder is left alone; mean colours tell the classes apart; the export has its head."""
    run = probe_settings(dataset, whole, kind="sgd")
    assert train.train(run, tmp_path / "run") == 0
    params, _ = checkpoint.load_params(tmp_path / "run")
    assert set(params) == {"head", "running_mean", "running_var"}
    measured = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    accuracy = [x["val/top1"] for x in measured if "val/top1" in x][-1]
    assert accuracy > 0.9
    _, weights = formats.read(tmp_path / "run")
    frozen, _ = checkpoint.load_params(whole)
    np.testing.assert_array_equal(weights.params["pos_embed"], frozen["pos_embed"])
    logits, labels = by_hand(layout.unflatten(weights.params), dataset, squash=False)
    assert (logits.argmax(axis=1) == labels).mean() == pytest.approx(accuracy)


def test_clipped_crops():
    rng = np.random.default_rng(0)
    drawn = [
        views.draw(rng, 40, 100, scale=(0.9, 1), ratio=(0.75, 4 / 3), flip=False, clip=True)
        for _ in range(200)
    ]
    assert {view.height for view in drawn} == {40}  # torchvision's would be the centre each time
    assert len({view.left for view in drawn}) > 10 and max(view.width for view in drawn) < 80
