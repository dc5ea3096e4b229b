"""Heads on a frozen encoder: MAE's linear probe, the grids of DINOv2 and AIM."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from dgpt_jax import (
    batching,
    checkpoint,
    config,
    images,
    load,
    optim,
    schema,
    tasks,
    train,
    views,
)
from dgpt_jax.convert import formats, layout
from dgpt_jax.evals import results
from dgpt_jax.schema import UserError
from tests.classifying import DEEP, by_hand, settings, untrained
from tests.data import image_dataset, tiny_model


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """24 pictures of two classes."""
    return image_dataset(tmp_path_factory.mktemp("probes"), per_class=12)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("encoder") / "a.safetensors", "cls", **DEEP)


def probe_settings(dataset, weights, **changes) -> config.Train:
    """MAE's linear probe."""
    plain = {"mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0, "erase": 0.0, "smoothing": 0.0,
             "randaugment": "", "train": "head", "weights": str(weights)}  # fmt: skip
    optim = {"kind": "lars", "layer_decay": 1.0, "weight_decay": 0.0, "ema": 0.0, "blr": 32.0}
    return settings(dataset, classify=plain, optim=optim | changes)


def test_a_linear_probe(dataset, tmp_path):
    """The encoder is left alone; mean colours tell the classes apart; the export has its head."""
    weights = untrained(tmp_path / "a.safetensors", "mean")
    run = probe_settings(dataset, weights, kind="sgd")
    assert train.train(run, tmp_path / "run") == 0
    params, _ = checkpoint.load_params(tmp_path / "run")
    assert set(params) == {"head", "running_mean", "running_var"}
    measured = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    accuracy = [x["val/top1"] for x in measured if "val/top1" in x][-1]
    assert accuracy > 0.9
    (_, probe), (_, frozen) = (formats.read(path) for path in (tmp_path / "run", weights))
    np.testing.assert_array_equal(probe.params["pos_embed"], frozen.params["pos_embed"])
    logits, labels = by_hand(layout.unflatten(probe.params), dataset, squash=False)
    assert (logits.argmax(axis=1) == labels).mean() == pytest.approx(accuracy)


def grid_settings(dataset, encoder, head: str, grid=(0.01, 1.0), **changes) -> config.Train:
    kind = {"dinov2": "sgd", "attentive": "adamw"}[head]
    found = probe_settings(dataset, encoder, kind=kind, blr=1.0)
    found = dataclasses.replace(
        found, optim=dataclasses.replace(found.optim, grid=grid, min_lr=0.0),
        model=tiny_model(**DEEP), classify=dataclasses.replace(
            found.classify, head=head, pooling={"dinov2": "cls", "attentive": "mean"}[head]),
    )  # fmt: skip
    return schema.parse(config.Train, schema.to_dict(dataclasses.replace(found, **changes)))


def head_of(tree, i: int):
    """The one head of a stack."""
    return jax.tree.map(lambda x: x[i], tree)


@pytest.mark.parametrize("head", ["dinov2", pytest.param("attentive", marks=pytest.mark.slow)])
def test_a_step_of_a_grid_is_that_of_every_head(dataset, encoder, head):
    """The same from a run with one learning rate, which begins with the same head."""
    grid = (0.5, 8.0)
    task = tasks.open_task(grid_settings(dataset, encoder, head, grid))
    batch = next(batching.train_batches(task.examples, 8, rows=np.arange(8), start_step=0))

    def stepped(task, params, peaks):
        tx = task.optimizer(optim.schedule(peaks, 0, 6))

        @jax.jit
        def step(params, batch):
            prepared = task.prepare(jax.random.key(0), batch)
            gradient = jax.value_and_grad(task.loss, has_aux=True)
            (value, parts), grads = gradient(params, task.frozen, prepared)
            updates, _ = tx.update(grads, tx.init(params), params, value=value)
            return value, parts["loss"], optax.apply_updates(params, updates)

        return step(params, batch)

    params = task.init(jax.random.key(0))
    value, parts, after = stepped(task, params, np.array(grid))
    assert len(task.heads) == {"dinov2": 8, "attentive": 2}[head]
    np.testing.assert_allclose(value, parts.mean(), rtol=1e-6)
    alone = tasks.open_task(grid_settings(dataset, encoder, head, grid[:1]))
    for i, rate in enumerate(grid):
        one = {name: x for name, x in params.items() if name not in task.stacks}
        for name in task.stacks:
            one[name] = jax.tree.map(lambda x: x[None], head_of(params[name], i))
        _, _, expected = stepped(alone, one, np.array([rate]))
        for name in task.stacks:
            before = head_of(params[name], i)
            ours, theirs = (
                jax.tree.map(jnp.subtract, head_of(found[name], at), before)
                for found, at in ((after, i), (expected, 0))
            )
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), ours, theirs
            )
            assert all(jnp.abs(x).max() > 0 for x in jax.tree.leaves(ours))


@pytest.fixture(scope="module")
def some_digits(tmp_path_factory):
    """300 digits to train on and 97 to test."""
    root = tmp_path_factory.mktemp("digits")
    data = load_digits()
    for i in range(397):
        picture = Image.fromarray((data.images[i] * 255 / 16).astype(np.uint8)).resize((16, 16))
        path = root / "folder" / ("test" if i >= 300 else "train") / str(data.target[i])
        path.mkdir(parents=True, exist_ok=True)
        picture.save(path / f"{i}.png")
    images.import_images(root / "folder", root / "images", say=lambda _: 0)
    return root / "images"


@pytest.mark.parametrize("head", ["attentive", pytest.param("dinov2", marks=pytest.mark.slow)])
def test_a_grid_on_digits(some_digits, encoder, tmp_path, capsys, head):
    """Random features tell digits apart; the best head is reported, and every head is in the
    results, about the encoder."""
    large = {"dinov2": 4.0, "attentive": 0.24}[head]  # times 32 / 256
    base = grid_settings(some_digits, encoder, head, grid=(1e-4, large), total="60 steps")
    run = dataclasses.replace(
        base, batch_size=32, classify=dataclasses.replace(base.classify, num_classes=10, resize=16),
        evals=dataclasses.replace(base.evals, heldout_split="test", every="30 steps"),
        data=dataclasses.replace(base.data, crop_scale=(0.8, 1.0), flip=False), log_every=30,
    )  # fmt: skip
    assert train.train(run, tmp_path) == 0
    found = results.read(tmp_path / "results.json")
    assert found["weights"] == str(encoder) and found["model"]["depth"] == 6
    shown = [row for row in found["results"] if not row.get("detail")]
    each = [row for row in found["results"] if row.get("detail")]
    assert [(row["epoch"], row["squash"]) for row in shown] == [
        ("last", False), ("best", False), ("last", True), ("best", True),
    ]  # fmt: skip
    names = tasks.open_task(run).heads
    assert [row["head"] for row in each] == [*names, *names]
    last = shown[0]
    assert last["correct"] == max(row["correct"] for row in each[: len(names)])
    assert (last["test"], last["step"]) == (97, 60) and last["accuracy"] > 25  # by chance 10
    assert (
        last["head"].endswith(f"lr{large / 8}") and "head, on the test images" in last["selection"]
    )
    slow = [row["accuracy"] for row in each if row["head"].endswith("lr1.25e-05")]
    assert max(slow) < last["accuracy"]
    assert f"lr{large / 8}" not in capsys.readouterr().err  # details are in the log alone
    with pytest.raises(UserError, match=f"holds a grid of heads .{head}. and no encoder: that is"):
        formats.read(tmp_path)
    with pytest.raises(UserError, match="holds a grid of heads"):
        load.load_encoder(tmp_path)


def test_grids_that_do_not_fit(dataset, encoder):
    run = grid_settings(dataset, encoder, "dinov2")
    optim, classify = run.optim, run.classify
    for changes, message in (
        ({"optim": dataclasses.replace(optim, grid=())}, r"config.optim.grid \(\) must name"),
        ({"optim": dataclasses.replace(optim, grid=(0.1, 0.0))}, r"grid\[1\] must be above 0"),
        ({"classify": dataclasses.replace(classify, head="linear")}, "and be empty else"),
        ({"classify": dataclasses.replace(classify, train="all")}, "and be empty else"),
        ({"classify": dataclasses.replace(classify, pooling="mean")}, "needs classify.pooling=cls"),
        ({"evals": dataclasses.replace(run.evals, heldout="")}, "config.evals.heldout is empty"),
        ({"model": tiny_model()}, "reads the last 4 blocks, the model has 3"),
    ):
        with pytest.raises(UserError, match=message):
            schema.parse(config.Train, schema.to_dict(dataclasses.replace(run, **changes)))


def test_clipped_crops():
    rng = np.random.default_rng(0)
    drawn = [
        views.draw(rng, 40, 100, scale=(0.9, 1), ratio=(0.75, 4 / 3), flip=False, clip=True)
        for _ in range(200)
    ]
    assert {view.height for view in drawn} == {40}  # torchvision's would be the centre each time
    assert len({view.left for view in drawn}) > 10 and max(view.width for view in drawn) < 80
