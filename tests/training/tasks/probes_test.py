"""Probes on a frozen encoder: MAE's linear probe, grids of heads of DINOv2 and AIM."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from dgpt_jax import train
from dgpt_jax.config import roots, schema
from dgpt_jax.data import image_ops, loader
from dgpt_jax.data.ingest import importer
from dgpt_jax.errors import UserError
from dgpt_jax.evals import results
from dgpt_jax.storage import orbax_checkpoint
from dgpt_jax.training import optimizer, tasks
from dgpt_jax.weights import api, mapping, registry
from tests.support.classifying import DEEP, by_hand, settings, untrained
from tests.support.data import image_dataset, tiny_model


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """24 images of two classes."""
    return image_dataset(tmp_path_factory.mktemp("probes"), per_class=12)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("encoder") / "a.safetensors", "cls", **DEEP)


def probe_settings(dataset, weights, **changes) -> roots.TrainConfig:
    """MAE's linear probe."""
    plain = {"mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0, "random_erase_prob": 0.0,
             "label_smoothing": 0.0, "randaugment": "", "trainable": "head"}  # fmt: skip
    optim = {"kind": "lars", "layer_decay": 1.0, "weight_decay": 0.0, "ema": 0.0, "blr": 32.0}
    init = {"weights": str(weights)}
    return settings(dataset, classify=plain, init=init, optim=optim | changes)


def test_a_linear_probe(dataset, tmp_path):
    """The encoder stays frozen, the classes are separable by mean color, the export has a head."""
    weights = untrained(tmp_path / "a.safetensors", "mean")
    run = probe_settings(dataset, weights, kind="sgd")
    assert train.train(run, tmp_path / "run") == 0
    params, _ = orbax_checkpoint.load_params(tmp_path / "run")
    assert set(params) == {"head", "running_mean", "running_var"}
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    accuracy = [x["val/top1"] for x in lines if "val/top1" in x][-1]
    assert accuracy > 0.9
    (_, probe), (_, frozen) = (registry.read(path) for path in (tmp_path / "run", weights))
    np.testing.assert_array_equal(probe.params["pos_embed"], frozen.params["pos_embed"])
    logits, labels = by_hand(mapping.unflatten(probe.params), dataset, squash=False)
    assert (logits.argmax(axis=1) == labels).mean() == pytest.approx(accuracy)


def grid_settings(dataset, encoder, head: str, grid=(0.01, 1.0), **changes) -> roots.TrainConfig:
    kind = {"dinov2": "sgd", "attentive": "adamw"}[head]
    run = probe_settings(dataset, encoder, kind=kind, blr=1.0)
    run = dataclasses.replace(
        run, optim=dataclasses.replace(run.optim, base_lr_grid=grid, min_lr=0.0),
        model=tiny_model(**DEEP), classify=dataclasses.replace(
            run.classify, head=head, pooling={"dinov2": "cls", "attentive": "mean"}[head]),
    )  # fmt: skip
    return schema.parse(roots.TrainConfig, schema.to_dict(dataclasses.replace(run, **changes)))


def head_of(tree, i: int):
    """Head i of a stack."""
    return jax.tree.map(lambda x: x[i], tree)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["dinov2", "attentive"])
def test_a_step_of_a_grid_equals_steps_of_single_heads(dataset, encoder, head):
    """Each from the same initial head."""
    grid = (0.5, 8.0)
    task = tasks.open_task(grid_settings(dataset, encoder, head, grid))
    batch = next(loader.train_batches(task.examples, 8, rows=np.arange(8), start_step=0))

    def stepped(task, params, peaks):
        tx = task.optimizer(optimizer.schedule(peaks, 0, 6))

        @jax.jit
        def step(params, batch):
            prepared = task.prepare(jax.random.key(0), batch)
            gradient = jax.value_and_grad(task.loss, has_aux=True)
            (value, losses), grads = gradient(params, task.frozen, prepared)
            updates, _ = tx.update(grads, tx.init(params), params, value=value)
            return value, losses["loss"], optax.apply_updates(params, updates)

        return step(params, batch)

    params = task.init(jax.random.key(0))
    value, losses, after = stepped(task, params, np.array(grid))
    assert len(task.heads) == {"dinov2": 8, "attentive": 2}[head]
    np.testing.assert_allclose(value, losses.mean(), rtol=1e-6)
    alone = tasks.open_task(grid_settings(dataset, encoder, head, grid[:1]))
    for i, rate in enumerate(grid):
        one = {name: x for name, x in params.items() if name not in task.stacks}
        for name in task.stacks:
            one[name] = jax.tree.map(lambda x: x[None], head_of(params[name], i))
        _, _, expected = stepped(alone, one, np.array([rate]))
        for name in task.stacks:
            before = head_of(params[name], i)
            ours, theirs = (
                jax.tree.map(jnp.subtract, head_of(tree[name], index), before)
                for tree, index in ((after, i), (expected, 0))
            )
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), ours, theirs
            )
            assert all(jnp.abs(x).max() > 0 for x in jax.tree.leaves(ours))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """300 training and 97 test digits."""
    root = tmp_path_factory.mktemp("digits")
    data = load_digits()
    for i in range(397):
        image = Image.fromarray((data.images[i] * 255 / 16).astype(np.uint8)).resize((16, 16))
        path = root / "folder" / ("test" if i >= 300 else "train") / str(data.target[i])
        path.mkdir(parents=True, exist_ok=True)
        image.save(path / f"{i}.png")
    importer.import_images(root / "folder", root / "images", say=lambda _: 0)
    return root / "images"


@pytest.mark.parametrize("head", ["attentive", pytest.param("dinov2", marks=pytest.mark.slow)])
def test_a_grid_on_digits(digits, encoder, tmp_path, capsys, head):
    """With random features; the best head is reported, and all heads are in the results of the
    encoder."""
    large = {"dinov2": 4.0, "attentive": 0.24}[head]  # times 32 / 256
    base = grid_settings(digits, encoder, head, grid=(1e-4, large), total="60 steps")
    run = dataclasses.replace(
        base, batch_size=32, classify=dataclasses.replace(base.classify, num_classes=10, resize=16),
        evals=dataclasses.replace(base.evals, heldout_split="test", every="30 steps"),
        data=dataclasses.replace(base.data, crop_scale=(0.8, 1.0), flip=False), log_every=30,
    )  # fmt: skip
    assert train.train(run, tmp_path) == 0
    record = results.read(tmp_path / "results.json")
    assert record["weights"] == str(encoder) and record["model"]["depth"] == 6
    shown = [row for row in record["results"] if not row.get("detail")]
    each = [row for row in record["results"] if row.get("detail")]
    assert [(row["epoch"], row["squash"]) for row in shown] == [
        ("last", False), ("best", False), ("last", True), ("best", True),
    ]  # fmt: skip
    names = tasks.open_task(run).heads
    assert [row["head"] for row in each] == [*names, *names]
    last = shown[0]
    assert last["correct"] == max(row["correct"] for row in each[: len(names)])
    assert (last["test"], last["step"]) == (97, 60) and last["accuracy"] > 25  # chance is 10
    assert (
        last["head"].endswith(f"lr{large / 8}") and "head, on the test images" in last["selection"]
    )
    slow = [row["accuracy"] for row in each if row["head"].endswith("lr1.25e-05")]
    assert max(slow) < last["accuracy"]
    assert f"lr{large / 8}" not in capsys.readouterr().err  # details are in metrics.jsonl only
    with pytest.raises(UserError, match=f"{tmp_path}.*{head}"):
        registry.read(tmp_path)
    with pytest.raises(UserError, match=str(tmp_path)):
        api.load_encoder(tmp_path)


def test_invalid_grids_are_refused(dataset, encoder):
    run = grid_settings(dataset, encoder, "dinov2")
    optim, classify = run.optim, run.classify
    for changes, message in (
        (
            {"optim": dataclasses.replace(optim, base_lr_grid=())},
            r"config.optim.base_lr_grid",
        ),
        (
            {"optim": dataclasses.replace(optim, base_lr_grid=(0.1, 0.0))},
            r"base_lr_grid\[1\]",
        ),
        ({"classify": dataclasses.replace(classify, head="linear")}, "base_lr_grid"),
        ({"classify": dataclasses.replace(classify, trainable="all")}, "base_lr_grid"),
        ({"classify": dataclasses.replace(classify, pooling="mean")}, "pooling=cls"),
        ({"evals": dataclasses.replace(run.evals, heldout="")}, "config.evals.heldout"),
        ({"model": tiny_model()}, "4 blocks.* 3"),
    ):
        with pytest.raises(UserError, match=message):
            schema.parse(roots.TrainConfig, schema.to_dict(dataclasses.replace(run, **changes)))


def test_clipped_crops():
    rng = np.random.default_rng(0)
    views = [
        image_ops.draw_view(
            rng, 40, 100, scale=(0.9, 1), ratio=(0.75, 4 / 3), flip=False, clip=True
        )
        for _ in range(200)
    ]
    assert {view.height for view in views} == {40}  # torchvision would use the center every time
    assert len({view.left for view in views}) > 10 and max(view.width for view in views) < 80
