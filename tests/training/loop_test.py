"""Training runs: exact resume, decreasing loss, and outputs that all other commands can read."""

import io
import json
import re
import shutil
import signal
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from sklearn.datasets import load_digits

import dgpt_jax
from dgpt_jax import cli, evaluate, train
from dgpt_jax.commands import convert, report, visualize
from dgpt_jax.config import roots, schema
from dgpt_jax.data import loader
from dgpt_jax.data.ingest import importer
from dgpt_jax.distributed import preemption, sharding
from dgpt_jax.errors import UserError
from dgpt_jax.monitoring import metrics
from dgpt_jax.storage import orbax_checkpoint
from dgpt_jax.training import checkpointing, optimizer, train_step
from dgpt_jax.training.tasks.pretrain import open_pretrain
from tests.monitoring.metrics_test import events
from tests.support.data import TINY, image_dataset, random_teacher, token_store
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """(image dataset, teacher, token store) of 20 images."""
    root = tmp_path_factory.mktemp("train")
    dataset = image_dataset(root, per_class=10)
    teacher = random_teacher(root / "teacher")
    return dataset, teacher, token_store(root, dataset, teacher, views=2)


def settings(path, **changes) -> roots.TrainConfig:
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
    return schema.parse(roots.TrainConfig, defaults)


def metrics_of(workdir) -> list[dict]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def stop_after(monkeypatch, steps: int, number):
    """Raises a signal in this process while a step is in progress."""
    prefetch = loader.prefetch_to_device

    def interrupted(batches, to_device):
        stream = prefetch(batches, to_device)
        try:
            for count, batch in enumerate(stream, start=1):
                if count == steps:
                    signal.raise_signal(number)
                yield batch
        finally:
            stream.close()

    monkeypatch.setattr(loader, "prefetch_to_device", interrupted)


@pytest.fixture(scope="module")
def full_run(inputs, tmp_path_factory):
    """Work directory of an uninterrupted run of 20 steps."""
    workdir = tmp_path_factory.mktemp("full")
    assert train.train(settings(inputs[2]), workdir) == 0
    return workdir


@pytest.mark.smoke
def test_an_interrupted_run_resumes_exactly(inputs, full_run, tmp_path, monkeypatch):
    run = settings(inputs[2], profile=(2, 4))
    with monkeypatch.context() as patch:
        stop_after(patch, 10, signal.SIGTERM)
        assert train.train(run, tmp_path) == preemption.EXIT_PREEMPTED
    assert orbax_checkpoint.find(tmp_path)[1] == 10
    assert train.train(run, tmp_path) == 0
    expected, resumed = metrics_of(full_run), metrics_of(tmp_path)
    assert [line["step"] for line in resumed] == list(range(1, 21))
    for name in ("loss", "next", "visible", "grad_norm", "learning_rate"):
        assert [line[name] for line in resumed] == [line[name] for line in expected]
    a, b = (state_of(run, workdir, step=20) for workdir in (full_run, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    for trace in tmp_path.glob("profile/plugins/profile/*/*.xplane.pb"):
        assert b"step_num" in trace.read_bytes()  # of StepTraceAnnotation
    assert traces(tmp_path) == ["step_12", "step_2"]  # relative to the first step of each command


def traces(workdir) -> list[str]:
    """Directories with a profile for TensorBoard."""
    files = workdir.glob("profile/plugins/profile/*/*.xplane.pb")
    return sorted(file.parent.name for file in files if file.stat().st_size)


def state_of(run, workdir, step: int) -> train_step.TrainState:
    """Parameters, optimizer state and step of a run."""
    tx = optimizer.optimizer(run.optim, optimizer.schedule(1.0, 2, 20))
    abstract = train_step.abstract_state(open_pretrain(run).init, tx, sharding.make_mesh(run.mesh))
    checkpoints = checkpointing.Checkpoints(workdir, keep=2)
    try:
        return checkpoints.restore(step, abstract)
    finally:
        checkpoints.close()


def test_a_finished_run_is_not_changed(inputs, full_run, capsys):
    before = (full_run / "metrics.jsonl").read_bytes()
    assert train.train(settings(inputs[2]), full_run) == 0
    assert (full_run / "metrics.jsonl").read_bytes() == before
    assert f"{full_run} holds step 20" in capsys.readouterr().err


def test_a_run_does_not_resume_with_another_model(inputs, full_run, tmp_path, capsys):
    workdir = shutil.copytree(full_run, tmp_path / "copy")
    with pytest.raises(UserError, match=r"config.model.depth is 2.* 3: .*--workdir"):
        train.train(settings(inputs[2], model={"depth": 2, "taps": (1, 2)}), workdir)
    assert (workdir / "config.json").read_bytes() == (full_run / "config.json").read_bytes()
    other = settings(inputs[2], total="20 steps", log_every=2)
    assert train.train(other, workdir) == 0
    assert "config.log_every is 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"data": {"path": "absent"}}, "absent"),
        ({"optim": {"warmup": "9 epochs"}}, "config.optim.warmup"),
        ({"evals": {"heldout": "absent"}}, "absent"),
        ({"evals": {"knn": "absent"}}, "absent"),
        ({"checkpoint": {"best": "knn/cls"}}, "config.checkpoint.best"),
        ({"seed": 7}, "config.seed is 7"),  # of a run in this directory
    ],
)
def test_errors_precede_all_other_lines(inputs, full_run, tmp_path, capsys, changes, message):
    """The error is not found below the table of processes and the config."""
    workdir = full_run if "seed" in changes else tmp_path / "run"
    with pytest.raises(UserError, match=message):
        train.train(settings(inputs[2], **changes), workdir)
    assert not capsys.readouterr().err


@pytest.mark.slow
def test_the_configured_values_are_printed(inputs, tmp_path, capsys):
    """Those that differ from the defaults; config.json has all."""
    run = settings(inputs[2], total="2 steps", optim={"warmup": "1 steps"})
    train.train(run, tmp_path)
    lines = capsys.readouterr().err.splitlines()
    shown = [line.split()[0] for line in lines if re.match(r"config\.\S+ = ", line)]
    saved = schema.flatten(json.loads((tmp_path / "config.json").read_text()))
    defaults = schema.flatten(json.loads(json.dumps(schema.to_dict(roots.TrainConfig()))))
    changed = [f"config.{name}" for name in saved if saved[name] != defaults[name]]
    assert shown == changed and "config.total" in shown and "config.seed" not in shown
    assert len(shown) < len(saved) / 3


def test_ctrl_c_saves(inputs, tmp_path, monkeypatch):
    stop_after(monkeypatch, 3, signal.SIGINT)
    assert train.train(settings(inputs[2], profile=(1, 9)), tmp_path) == 130
    assert orbax_checkpoint.find(tmp_path)[1] == 3
    assert traces(tmp_path) == ["step_1"]


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_in_the_last_step_does_not_resume(inputs, tmp_path, monkeypatch, number, capsys):
    """The run is finished: its results are saved and the command succeeds."""
    stop_after(monkeypatch, 2, number)
    run = settings(inputs[2], total="2 steps", optim={"warmup": "1 steps"})
    assert train.train(run, tmp_path) == 0
    lines = capsys.readouterr().err.splitlines()
    assert orbax_checkpoint.find(tmp_path)[1] == 2 and lines[-1].startswith("next: python ")
    assert f"finished: {tmp_path} holds step 2, the last" in lines


@pytest.mark.slow
def test_an_implicit_transfer_in_the_loop_is_an_error(inputs, tmp_path, monkeypatch):
    make_train_step = train.make_train_step

    def with_host_arrays(*args, **kwargs):
        step = make_train_step(*args, **kwargs)
        return lambda state, running, batch, frozen: step(
            state, running, batch | {"order": np.asarray(batch["order"])}, frozen
        )

    monkeypatch.setattr(train, "make_train_step", with_host_arrays)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        train.train(settings(inputs[2]), tmp_path)


@pytest.mark.slow
def test_the_loss_decreases_on_digits(tmp_path):
    (tmp_path / "folder").mkdir()
    for i, digit in enumerate(load_digits().images[:200]):
        image = Image.fromarray((digit * 255 / 16).astype(np.uint8)).resize((24, 24))
        image.save(tmp_path / f"folder/{i:03d}.png")
    importer.import_images(tmp_path / "folder", tmp_path / "images", say=lambda _: None)
    store = token_store(tmp_path, tmp_path / "images", random_teacher(tmp_path / "teacher"))
    run = settings(
        store, total="60 steps", batch_size=32, optim={"blr": 0.016},
        evals={"heldout": str(store), "every": "50%", "batch_size": 64},
    )  # fmt: skip
    assert train.train(run, tmp_path / "run") == 0
    lines = metrics_of(tmp_path / "run")
    for name in ("next", "visible"):
        first, last = (np.mean([x[name] for x in some]) for some in (lines[:5], lines[-5:]))
        assert last < 0.75 * first, name
    heldout = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    heldout = [x for x in heldout if "heldout/next" in x]
    assert [x["step"] for x in heldout] == [30, 60]
    assert heldout[-1]["heldout/visible"] < heldout[0]["heldout/visible"]
    # Images in TensorBoard: the first batch, and predictions at every evaluation.
    images = [(s, v.tag, v.image) for s, v in events(tmp_path / "run") if v.HasField("image")]
    assert [(step, tag) for step, tag, _ in images] == [
        (0, "crops"), (30, "predictions"), (60, "predictions"),
    ]  # fmt: skip
    assert (images[0][2].height, images[1][2].height) == (116, 6 * 116)
    cosines = [_mean_of_last_rows(image) for _, _, image in images[1:]]
    assert cosines[1] > cosines[0]  # brighter


def _mean_of_last_rows(image) -> float:
    """Mean green of the cosine maps; in viridis it increases with the value."""
    pixels = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
    return pixels[4 * 116 :, 160:, 1].mean()


@pytest.mark.parametrize("evaluated", [False, True])
def test_a_best_metric_that_is_not_evaluated_is_refused(inputs, tmp_path, evaluated):
    """Before the first step."""
    _, _, store = inputs
    evals = {"heldout": str(store), "every": "1 steps", "figures": 0} if evaluated else {}
    config = settings(store, evals=evals, checkpoint={"best": "heldout/loss"})
    remedy = "heldout/next" if evaluated else "config.evals.heldout"
    with pytest.raises(UserError, match=f"config.checkpoint.best=heldout/loss .*{remedy}"):
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


def test_accumulated_gradients_equal_those_of_the_batch(inputs):
    """One step with 1 and with 4 micro-batches: the same metrics and the same update."""
    mesh = sharding.make_mesh(roots.MeshConfig())
    tx = optax.sgd(1.0)  # unlike Adam, shows a gradient of the wrong scale
    task = open_pretrain(settings(inputs[2]))
    batch = next(loader.train_batches(task.examples, 8, rows=np.arange(8), start_step=0))
    results = []
    for k in (1, 4):
        initial = train_step.init_state(task.init, tx, mesh, seed=0)
        step_fn = train_step.make_train_step(task.loss, tx, mesh, accum_steps=k)
        running = metrics.averages(task.metric_names).empty()
        placed = sharding.global_batch(mesh, 8, batch)
        results.append(step_fn(initial, running, placed, {}))
    for after, running in results[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            after.params, results[0][0].params,
        )  # fmt: skip
        expected = results[0][1].compute()
        for name, value in running.compute().items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-5)


def test_losses_of_online_and_stored_tokens_agree(inputs):
    """On the same images and orders."""
    dataset, teacher, store = inputs
    stored = open_pretrain(settings(store))
    online = open_pretrain(
        settings(dataset, data={"targets": "online"}, teacher={"weights": str(teacher)})
    )
    params = stored.init(jax.random.key(0))
    batch = next(loader.train_batches(stored.examples, 8, rows=np.arange(8), start_step=0))
    _, a = jax.jit(stored.loss)(params, {}, batch)
    _, b = jax.jit(online.loss)(params, online.frozen, batch)
    for name in ("next", "visible"):
        np.testing.assert_allclose(a[name], b[name], atol=0.01)
    gradients = jax.jit(jax.grad(lambda f: online.loss(params, f, batch)[0]))(online.frozen)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradients))


@pytest.mark.slow
def test_online_and_pixel_runs(inputs, tmp_path, monkeypatch):
    """The step of each is compiled once."""
    dataset, teacher, _ = inputs
    steps, make = [], train.make_train_step
    monkeypatch.setattr(
        train, "make_train_step", lambda *a, **kw: steps.append(make(*a, **kw)) or steps[-1]
    )
    knn = {"knn": str(dataset), "knn_test": "train", "knn_resize": 16, "every": "3 steps"}
    heldout = {"heldout": str(dataset), "heldout_split": "train", "max_examples": 16}
    for targets, visible, evals in (("online", 1.0, knn | heldout), ("pixels", 0.0, knn)):
        run = settings(
            dataset, total="3 steps", log_every=2, data={"targets": targets},
            loss={"visible": visible},
            teacher={"weights": str(teacher)}, evals=evals,
        )  # fmt: skip
        assert train.train(run, tmp_path / targets) == 0
        text = (tmp_path / targets / "metrics.jsonl").read_text()
        assert ("visible" in text) == bool(visible) and "knn/cls" in text
        tags = {value.tag for _, value in events(tmp_path / targets) if value.HasField("image")}
        assert tags == ({"crops", "predictions"} if "heldout" in evals else {"crops"})
    assert [step._cache_size() for step in steps] == [1, 1]


def test_load_encoder_and_load_digpt_read_a_run(inputs, full_run):
    saved = json.loads((full_run / "config.json").read_text())
    assert schema.parse(roots.TrainConfig, saved) == settings(inputs[2])
    encoder, model = dgpt_jax.load_encoder(full_run), dgpt_jax.load_digpt(full_run)
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


def test_visualize_and_report_read_a_run(inputs, full_run, monkeypatch):
    argv = [full_run, "--show=predictions", f"--store={inputs[2]}", "--count=2"]
    argv += [f"--out={full_run / 'predictions.png'}"]
    monkeypatch.setattr(sys, "argv", ["visualize", *map(str, argv)])
    visualize.main()
    page = report.page(full_run)
    assert "predictions.png" in page and "checkpoints of steps</td><td>20" in page
    assert "finished 20 steps" in page and "crops at step 0" in page


@pytest.mark.parametrize("protocol", ["knn", "linear", "fewshot"])
def test_evaluate_reads_a_run(inputs, full_run, tmp_path, monkeypatch, capsys, protocol):
    argv = [
        f"--config={ROOT}/configs/{protocol}_in1k.py", f"--config.data={inputs[0]}",
        "--config.train=train", "--config.test=train[:8]", "--config.k=3,5", "--config.shots=2,0",
        "--config.seeds=0,1", "--config.resize=16", "--config.batch_size=8",
        f"--checkpoint={full_run}", f"--out={tmp_path}/results.json", "--config.features=mean",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["evaluate", *argv])
    cli.run(evaluate.main)
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    single = [r for r in results if not str(r["seed"]).startswith("mean")]
    assert [(r["shots"], r["seed"], r["train"]) for r in single] == [
        (shots, seed, train)
        for shots, seed, train in ((2, 0, 4), (2, 1, 4), ("all", None, 20))
        for _ in range(2 if protocol == "knn" else 1)
    ]
    assert all(r["test"] == 8 and 0 <= r["accuracy"] <= 100 for r in results)
    if protocol != "knn":  # the classes differ in mean color
        assert single[-1]["accuracy"] == 100
    assert "step 20" in capsys.readouterr().out


def test_convert_exports_a_run(full_run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["convert", str(full_run), str(tmp_path), "--to=timm"])
    cli.run(convert.main)
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        exported = dgpt_jax.load_encoder(path).features(images, "mean")
        np.testing.assert_array_equal(
            exported, dgpt_jax.load_encoder(full_run).features(images, "mean")
        )
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["num_features"] == 24 and written["pretrained_cfg"]["input_size"] == [3, 16, 16]
