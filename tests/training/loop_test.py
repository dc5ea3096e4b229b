"""The whole loop: resuming is exact, the loss falls, what it writes is read by everything else."""

import io
import json
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import convert
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import report_run
import visualize
from PIL import Image
from sklearn.datasets import load_digits

import dgpt_jax
from dgpt_jax import (
    batching,
    checkpoint,
    cli,
    config,
    evaluate,
    images,
    metrics,
    optim,
    saving,
    schema,
    sharding,
    signals,
    state,
    step,
    train,
)
from dgpt_jax.schema import UserError
from dgpt_jax.tasks.pretrain import open_pretrain
from tests.data import TINY, image_dataset, random_teacher, token_store
from tests.metrics_test import events

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(image dataset, teacher, token store) of 20 pictures."""
    root = tmp_path_factory.mktemp("train")
    dataset = image_dataset(root, per_class=10)
    teacher = random_teacher(root / "teacher")
    return dataset, teacher, token_store(root, dataset, teacher, views=2)


def settings(path, **changes) -> config.Train:
    defaults = dict(
        total="20 steps",
        batch_size=8,
        dtype="float32",
        log_every=1,
        model=TINY,
        data={"path": str(path), "threads": 2},
        optim={"blr": 0.064, "warmup": "10%"},
        checkpoint={"every": "100%"},
    )
    for name, value in changes.items():
        both = isinstance(value, dict) and name in defaults
        defaults[name] = defaults[name] | value if both else value
    return schema.parse(config.Train, defaults)


def metrics_of(workdir) -> list[dict]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def stop_after(monkeypatch, steps: int, number):
    """The process gets a signal while it works on a step."""
    ahead = batching.ahead

    def interrupted(batches, place):
        stream = ahead(batches, place)
        try:
            for count, batch in enumerate(stream, start=1):
                if count == steps:
                    signal.raise_signal(number)
                yield batch
        finally:
            stream.close()

    monkeypatch.setattr(batching, "ahead", interrupted)


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    """The work directory of 20 steps in one go."""
    workdir = tmp_path_factory.mktemp("whole")
    assert train.train(settings(made[2]), workdir) == 0
    return workdir


@pytest.mark.smoke
def test_20_steps_are_10_and_10_more(made, whole, tmp_path, monkeypatch):
    run = settings(made[2], profile=(2, 4))
    with monkeypatch.context() as patch:
        stop_after(patch, 10, signal.SIGTERM)
        assert train.train(run, tmp_path) == signals.EXIT_PREEMPTED
    assert checkpoint.find(tmp_path)[1] == 10
    assert train.train(run, tmp_path) == 0
    expected, parts = metrics_of(whole), metrics_of(tmp_path)
    assert [line["step"] for line in parts] == list(range(1, 21))
    for name in ("loss", "next", "visible", "grad_norm", "learning_rate"):
        assert [line[name] for line in parts] == [line[name] for line in expected]
    a, b = (state_of(run, workdir, step=20) for workdir in (whole, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert traces(tmp_path) == ["step_12", "step_2"]  # counted from where each command begins


def traces(workdir) -> list[str]:
    """The directories that TensorBoard shows as profiles, of one file each."""
    files = workdir.glob("profile/plugins/profile/*/*.xplane.pb")
    return sorted(file.parent.name for file in files if file.stat().st_size)


def state_of(run, workdir, step: int) -> state.TrainState:
    """Parameters, optimizer state and step of a run."""
    tx = optim.optimizer(run.optim, optim.schedule(1.0, 2, 20))
    abstract = state.abstract(open_pretrain(run).init, tx, sharding.make_mesh(run.mesh))
    checkpoints = saving.Checkpoints(workdir, keep=2)
    try:
        return checkpoints.restore(step, abstract)
    finally:
        checkpoints.close()


def test_a_finished_run_is_left_alone(made, whole, capsys):
    before = (whole / "metrics.jsonl").read_bytes()
    assert train.train(settings(made[2]), whole) == 0
    assert (whole / "metrics.jsonl").read_bytes() == before
    assert f"{whole} holds step 20" in capsys.readouterr().err


def test_another_model_does_not_continue_a_run(made, whole, tmp_path, capsys):
    workdir = shutil.copytree(whole, tmp_path / "copy")
    with pytest.raises(UserError, match=r"config.model.depth is 2, in the checkpoint .* 3: choose"):
        train.train(settings(made[2], model={"depth": 2, "taps": (1, 2)}), workdir)
    assert (workdir / "config.json").read_bytes() == (whole / "config.json").read_bytes()
    other = settings(made[2], total="20 steps", log_every=2)
    assert train.train(other, workdir) == 0
    assert "config.log_every is 2, in the checkpoint of step 20 1" in capsys.readouterr().err


def test_preflight_comes_before_the_data(tmp_path, capsys):
    with pytest.raises(UserError, match="no such directory"):
        train.train(settings(tmp_path / "absent"), tmp_path / "run")
    assert "process  host" in capsys.readouterr().err


def test_ctrl_c_saves(made, tmp_path, monkeypatch):
    stop_after(monkeypatch, 3, signal.SIGINT)
    assert train.train(settings(made[2], profile=(1, 9)), tmp_path) == 130
    assert checkpoint.find(tmp_path)[1] == 3
    assert traces(tmp_path) == ["step_1"]  # of the two steps that were done


def test_the_loss_falls_on_digits(tmp_path):
    (tmp_path / "folder").mkdir()
    for i, picture in enumerate(load_digits().images[:200]):
        image = Image.fromarray((picture * 255 / 16).astype(np.uint8)).resize((24, 24))
        image.save(tmp_path / f"folder/{i:03d}.png")
    images.import_images(tmp_path / "folder", tmp_path / "images", say=lambda _: None)
    store = token_store(tmp_path, tmp_path / "images", random_teacher(tmp_path / "teacher"))
    run = settings(
        store, total="60 steps", batch_size=32, optim={"blr": 0.016},
        evals={"heldout": str(store), "every": "50%", "batch_size": 64},
    )  # fmt: skip
    assert train.train(run, tmp_path / "run") == 0
    lines = metrics_of(tmp_path / "run")
    for name in ("next", "visible"):
        first, last = (np.mean([x[name] for x in part]) for part in (lines[:5], lines[-5:]))
        assert last < 0.75 * first, name
    heldout = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    heldout = [x for x in heldout if "heldout/next" in x]
    assert [x["step"] for x in heldout] == [30, 60]
    assert heldout[-1]["heldout/visible"] < heldout[0]["heldout/visible"]
    # And what TensorBoard shows: the first batch, and predictions whenever they are measured.
    shown = [(s, v.tag, v.image) for s, v in events(tmp_path / "run") if v.HasField("image")]
    assert [(step, tag) for step, tag, _ in shown] == [
        (0, "crops"), (30, "predictions"), (60, "predictions"),
    ]  # fmt: skip
    assert (shown[0][2].height, shown[1][2].height) == (116, 6 * 116)
    cosines = [_mean_of_last_rows(image) for _, _, image in shown[1:]]
    assert cosines[1] > cosines[0]  # brighter


def _mean_of_last_rows(image) -> float:
    """The green of the cosine maps, which viridis raises with the value."""
    pixels = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
    return pixels[4 * 116 :, 160:, 1].mean()


@pytest.mark.parametrize("measured", [False, True])
def test_the_best_of_what_is_not_measured(made, tmp_path, measured):
    """Refused before the first step."""
    _, _, store = made
    evals = {"heldout": str(store), "every": "1 steps", "pictures": 0} if measured else {}
    config = settings(store, evals=evals, checkpoint={"best": "heldout/loss"})
    known = "name one of heldout/next" if measured else "config.evals names no data"
    with pytest.raises(UserError, match=f"heldout/loss is not measured: {known}"):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_overfit_8_images(tmp_path):
    dataset = image_dataset(tmp_path, per_class=4)
    store = token_store(tmp_path, dataset, random_teacher(tmp_path / "teacher"))
    run = settings(
        store, total="300 steps", log_every=10, data={"order": "raster"}, optim={"blr": 0.1},
        model={"width": 48, "decoder_width": 48},
    )  # fmt: skip
    assert train.train(run, tmp_path / "run") == 0
    lines = metrics_of(tmp_path / "run")
    print([round(x["loss"], 4) for x in lines])
    assert lines[0]["loss"] > 1 and lines[-1]["loss"] < 0.02


def test_accumulated_gradients_are_the_batchs(made):
    """One step whole and in 4 micro-batches: the same metrics and the same update."""
    mesh = sharding.make_mesh(config.Mesh())
    tx = optax.sgd(1.0)  # unlike Adam, shows a gradient of the wrong scale
    task = open_pretrain(settings(made[2]))
    batch = next(batching.train_batches(task.examples, 8, rows=np.arange(8), start_step=0))
    results = []
    for k in (1, 4):
        begun = state.create(task.init, tx, mesh, seed=0)
        step_fn = step.make_train_step(task.loss, tx, mesh, accum_steps=k)
        running = metrics.averages(task.metric_names).empty()
        placed = sharding.global_batch(mesh, 8, batch)
        results.append(step_fn(begun, running, placed, {}))
    for after, running in results[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            after.params, results[0][0].params,
        )  # fmt: skip
        expected = results[0][1].compute()
        for name, value in running.compute().items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-5)


def test_the_online_teacher_gives_the_stored_tokens_losses(made):
    """The same pictures and orders: tokens from the step's own teacher, or from the store."""
    dataset, teacher, store = made
    stored = open_pretrain(settings(store))
    online = open_pretrain(
        settings(dataset, data={"targets": "online"}, teacher={"weights": str(teacher)})
    )
    params = stored.init(jax.random.key(0))
    batch = next(batching.train_batches(stored.examples, 8, rows=np.arange(8), start_step=0))
    _, a = jax.jit(stored.loss)(params, {}, batch)
    _, b = jax.jit(online.loss)(params, online.frozen, batch)
    for name in ("next", "visible"):
        np.testing.assert_allclose(a[name], b[name], atol=0.01)
    gradients = jax.jit(jax.grad(lambda f: online.loss(params, f, batch)[0]))(online.frozen)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradients))


def test_online_and_pixel_runs(made, tmp_path, monkeypatch):
    """Each with a step that is compiled once, though the first metrics come from elsewhere."""
    dataset, teacher, _ = made
    steps, make = [], train.make_train_step
    monkeypatch.setattr(
        train, "make_train_step", lambda *a, **kw: steps.append(make(*a, **kw)) or steps[-1]
    )
    knn = {"knn": str(dataset), "knn_test": "train", "knn_resize": 16, "every": "3 steps"}
    heldout = {"heldout": str(dataset), "heldout_split": "train", "most": 16}
    for targets, visible, evals in (("online", 1.0, knn | heldout), ("pixels", 0.0, knn)):
        run = settings(
            dataset, total="3 steps", log_every=2, data={"targets": targets},
            loss={"visible": visible},
            teacher={"weights": str(teacher)}, evals=evals,
        )  # fmt: skip
        assert train.train(run, tmp_path / targets) == 0
        text = (tmp_path / targets / "metrics.jsonl").read_text()
        assert ("visible" in text) == bool(visible) and "knn/cls" in text
        drawn = {value.tag for _, value in events(tmp_path / targets) if value.HasField("image")}
        assert drawn == ({"crops", "predictions"} if "heldout" in evals else {"crops"})
    assert [step._cache_size() for step in steps] == [1, 1]


def test_a_run_is_opened_again(made, whole):
    saved = json.loads((whole / "config.json").read_text())
    assert schema.parse(config.Train, saved) == settings(made[2])
    encoder, model = dgpt_jax.load_encoder(whole), dgpt_jax.load_digpt(whole)
    assert encoder.model == model.model and "step 20" in encoder.source
    rng = np.random.default_rng(0)
    images = rng.standard_normal((2, 16, 16, 3)).astype(np.float32)
    tokens = rng.standard_normal((2, 17, 24)).astype(np.float32)
    orders = np.stack([rng.permutation(4) for _ in range(2)])
    losses = jax.jit(model.losses)(images, tokens, orders)
    without = jax.jit(partial(model.losses, cls=False))(images, tokens[:, 1:], orders)
    assert set(losses) == set(without) == {"next", "visible"}
    assert losses["next"] != without["next"]

    def total(params, tokens):
        return sum(model.losses(images, tokens, orders, params=params).values())

    gradients, gradient = jax.jit(jax.grad(total, argnums=(0, 1)))(model.params, tokens)
    assert np.isfinite(gradient).all() and np.any(gradient)
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(gradients["encoder"]["blocks"]))


def test_a_run_is_looked_at(made, whole, monkeypatch):
    words = [whole, "--show=predictions", f"--store={made[2]}", "--count=2"]
    monkeypatch.setattr(sys, "argv", ["x", *map(str, words), f"--out={whole / 'predictions.png'}"])
    visualize.main()
    page = report_run.page(whole)
    assert page.count("data:image/png") == 1 and "checkpoints of steps</td><td>20" in page


@pytest.mark.parametrize("protocol", ["knn", "linear", "fewshot"])
def test_a_run_is_measured(made, whole, tmp_path, monkeypatch, capsys, protocol):
    words = [
        f"--config={ROOT}/configs/{protocol}_in1k.py", f"--config.data={made[0]}",
        "--config.train=train", "--config.test=train[:8]", "--config.k=3,5", "--config.shots=2,0",
        "--config.seeds=0,1", "--config.resize=16", "--config.batch_size=8",
        f"--checkpoint={whole}", f"--out={tmp_path}/results.json", "--config.features=mean",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["evaluate", *words])
    cli.run(evaluate.main)
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    single = [r for r in results if not str(r["seed"]).startswith("mean")]
    assert [(r["shots"], r["seed"], r["train"]) for r in single] == [
        (shots, seed, train)
        for shots, seed, train in ((2, 0, 4), (2, 1, 4), ("all", None, 20))
        for _ in range(2 if protocol == "knn" else 1)
    ]
    assert all(r["test"] == 8 and 0 <= r["accuracy"] <= 100 for r in results)
    if protocol != "knn":  # the mean colours tell the two classes apart
        assert single[-1]["accuracy"] == 100
    assert "step 20" in capsys.readouterr().out


def test_a_run_is_exported(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["convert", str(whole), str(tmp_path), "--to=timm"])
    cli.run(convert.main)
    pictures = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        exported = dgpt_jax.load_encoder(path).features(pictures, "mean")
        np.testing.assert_array_equal(
            exported, dgpt_jax.load_encoder(whole).features(pictures, "mean")
        )
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["num_features"] == 24 and written["pretrained_cfg"]["input_size"] == [3, 16, 16]
