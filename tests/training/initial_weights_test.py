"""Pretraining that starts from published weights."""

import dataclasses
import shutil
import signal

import jax
import numpy as np
import pytest

from dgpt_jax import train
from dgpt_jax.data import segments
from dgpt_jax.distributed import preemption, sharding
from dgpt_jax.errors import UserError
from dgpt_jax.models import classifier, digpt
from dgpt_jax.storage import orbax_checkpoint
from dgpt_jax.training import optimizer, tasks, train_step
from dgpt_jax.weights import api, export, files, mapping, registry
from dgpt_jax.weights.types import Preprocess, Weights, full_shapes
from tests.support import parity, published_encoders
from tests.support.conversions import convert, random_weights
from tests.support.data import image_dataset, random_teacher, tiny_model, token_store
from tests.training.loop_test import settings, stop_after


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Token store of 20 images."""
    root = tmp_path_factory.mktemp("init")
    dataset = image_dataset(root, per_class=10)
    return token_store(root, dataset, random_teacher(root / "teacher"))


def start_from(store, path, **changes):
    """Config of a short run that starts from weights."""
    init = {"weights": str(path)} | changes.pop("init", {})
    return settings(store, total="2 steps", init=init, **changes)


def residual(encoder: api.PretrainedEncoder, images: np.ndarray) -> np.ndarray:
    """Last residual (B, 1+N, D) of normalized images, before the final norm."""
    module = classifier.classifier(encoder.model, "mean")
    with jax.default_matmul_precision("highest"):
        return np.asarray(module.apply({"params": encoder.params}, images, method="tokens"))


def assert_close(actual: np.ndarray, expected: np.ndarray):
    """Equal to 1e-6 of the largest value."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


KINDS = [
    x if x == "timm" else pytest.param(x, marks=pytest.mark.slow) for x in published_encoders.MAKERS
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_starts_with_the_encoder_of_the_file(store, tmp_path, monkeypatch, capsys, kind):
    """With a learning rate of 0, whose updates are zero. Its export computes the same."""
    (tmp_path / "source").mkdir()
    path, reference = published_encoders.MAKERS[kind](tmp_path / "source")
    changes = published_encoders.SETTINGS[kind]
    run = start_from(store, path, optim={"blr": 0.0, "warmup": "0 steps"}, **changes)
    assert train.train(run, tmp_path / "run") == 0
    encoder = api.load_encoder(tmp_path / "run")
    images = parity.images(3, 16)
    actual, expected = residual(encoder, images), reference(images)
    if kind != "mae":  # whose positions are computed in float64
        file = api.load_encoder(path, heads=2 if kind == "mae" else None)
        np.testing.assert_array_equal(actual, residual(file, images))
    assert_close(actual, expected)
    assert encoder.preprocess == Preprocess(run.data.mean, run.data.std)
    identity = orbax_checkpoint.load_params(tmp_path / "run")[1]["init"]
    assert identity["path"] == str(path) and len(identity["sha256"]) == 16
    log = capsys.readouterr().err
    assert f"initial weights: {identity['source']}" in log and "dropped the final norm" in log
    assert "does not specify head counts: using config.model.heads=2" in log or kind != "mae"
    for target in ("safetensors", "timm" if kind != "hf" else "hf"):
        name = "a.safetensors" if target == "safetensors" else target
        part = (
            ("--part=encoder", "--pooling=cls") if target == "safetensors" else ("--pooling=cls",)
        )
        convert(monkeypatch, tmp_path / "run", tmp_path / name, f"--to={target}", *part)
        exported = api.load_encoder(tmp_path / name)
        np.testing.assert_array_equal(residual(exported, images), actual)
        assert exported.preprocess.mean == run.data.mean


def leaves(workdir, step: int) -> dict[str, np.ndarray]:
    return mapping.flatten(orbax_checkpoint.load_params(workdir, step)[0])


@pytest.mark.slow
def test_a_resumed_run_never_reads_the_weights(store, tmp_path, monkeypatch, capsys):
    """Nor does the freezing of blocks depend on where it was interrupted."""
    (tmp_path / "source").mkdir()
    path, _ = published_encoders.timm(tmp_path / "source")
    run = start_from(
        store, path, model={"positions": "learned"}, optim={"layer_decay": 0.5, "ema": 0.5},
        init={"freeze_blocks": 2, "freeze_steps": "3 steps"},
        checkpoint={"every": "1 steps", "keep": 9},
    )  # fmt: skip
    run = dataclasses.replace(run, total="5 steps")
    assert train.train(run, tmp_path / "full") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 2, signal.SIGTERM)
        assert train.train(run, tmp_path / "run") == preemption.EXIT_PREEMPTED
    shutil.rmtree(tmp_path / "source")
    capsys.readouterr()
    assert train.train(run, tmp_path / "run") == 0
    assert "config.init.weights is not read" in capsys.readouterr().err
    for step in (2, 3, 5):
        expected, actual = leaves(tmp_path / "full", step), leaves(tmp_path / "run", step)
        assert expected.keys() == actual.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(actual[name], array, err_msg=name)
    identities = [
        orbax_checkpoint.load_params(tmp_path / name, 5)[1]["init"] for name in ("full", "run")
    ]
    assert identities[0] == identities[1] and identities[0]["path"] == str(path)
    with pytest.raises(UserError, match="source/model.safetensors"):
        train.train(run, tmp_path / "new")


@pytest.mark.slow
def test_frozen_parameters_move_after_their_steps(store, tmp_path):
    """Moving averages would follow, so there are none here; step 0 has a learning rate of 0."""
    (tmp_path / "source").mkdir()
    path, _ = published_encoders.timm(tmp_path / "source")
    run = start_from(
        store, path, model={"positions": "learned"}, optim={"warmup": "0 steps"},
        init={"freeze_blocks": 2, "freeze_steps": "3 steps", "freeze_positions": True},
        checkpoint={"every": "1 steps", "keep": 9},
    )  # fmt: skip
    run = dataclasses.replace(run, total="5 steps")
    assert train.train(run, tmp_path / "run") == 0
    _, weights = registry.read(path)
    start, third, last = weights.params, leaves(tmp_path / "run", 3), leaves(tmp_path / "run", 5)
    np.testing.assert_array_equal(last["pos_embed"], start["pos_embed"])
    for name in third:
        if name.startswith("encoder/blocks/"):
            np.testing.assert_array_equal(third[name][:2], start[name][:2], err_msg=name)
            moved = (
                np.abs(third[name][2] - start[name][2]),
                np.abs(last[name][:2] - start[name][:2]),
            )
            assert all(x.max() > 0 for x in moved), name
        elif name.startswith("encoder/"):
            np.testing.assert_array_equal(third[name], start[name], err_msg=name)
            assert np.abs(last[name] - start[name]).max() > 0, name


def pretraining_model(out_width: int = 24, **changes) -> Weights:
    """A pretraining model of TINY with random parameters."""
    model, rng = tiny_model(**changes), np.random.default_rng(7)
    params = {
        path: 0.3 * rng.standard_normal(shape).astype(np.float32)
        for path, shape in full_shapes(model, out_width).items()
    }
    return Weights(model, params, None, "random")


def written(directory, weights: Weights, layout: str = "digpt"):
    """Writes weights, unchecked, to a file, by default the official code's .pth; returns it."""
    path = directory / ("model.pth" if layout == "digpt" else "model.safetensors")
    registry.LAYOUTS[layout].save(weights, path)
    return path


def test_decoders_of_the_official_file(store, tmp_path):
    pytest.importorskip("torch")
    source = pretraining_model()
    path = written(tmp_path, source)
    task = tasks.open_task(start_from(store, path, loss={"distill": 1.0}))
    weights = task.initial_weights()
    flat = mapping.flatten(weights.params)
    assert flat.keys() == source.params.keys()
    for name, array in flat.items():
        np.testing.assert_array_equal(array, source.params[name], err_msg=name)
    assert weights.notes[-1] == "loaded: encoder, next, visible"
    mesh = sharding.make_mesh(task.config.mesh)
    params = train_step.init_state(
        task.init, task.optimizer(lambda _: 0.1), mesh, 0, weights.params
    )
    assert set(params.params) == {"encoder", "next", "visible", "direct"}
    fresh = tasks.open_task(start_from(store, path, init={"decoders": "fresh"}))
    assert set(fresh.initial_weights().params) == {"encoder"}


def test_learned_positions_in_the_official_layout(store, tmp_path):
    """The plain PyTorch model computes the same with them."""
    pytest.importorskip("torch")
    source = pretraining_model(positions="learned")
    path, verified = export.write(source, registry.LAYOUTS["digpt"], tmp_path / "a.pth")
    assert verified.startswith("verified: decoder predictions in torch")
    _, weights = registry.read(path, heads=2, decoder_heads=2)
    assert weights.model.positions == "learned"
    np.testing.assert_array_equal(weights.params["pos_embed"], source.params["pos_embed"])
    run = start_from(store, path, model={"positions": "learned"})
    start = tasks.open_task(run).initial_weights()
    np.testing.assert_array_equal(start.params["pos_embed"], source.params["pos_embed"])
    with pytest.raises(UserError, match="ImageNet|normalizes"):
        other = dataclasses.replace(source, preprocess=Preprocess(mean=(0.5,) * 3))
        export.write(other, registry.LAYOUTS["digpt"], tmp_path / "b.pth")


def test_learned_positions_start_as_sincos():
    """Then the model computes what it does with fixed ones."""
    inputs = np.float32(parity.images(1, 16)), np.array([[0, 1, 2, 3], [3, 1, 0, 2]])
    outputs = []
    for positions in ("sincos", "learned"):
        module = digpt.build(tiny_model(positions=positions), out_width=8)
        params = module.init(jax.random.key(0), *inputs)["params"]
        outputs.append(module.apply({"params": params}, *inputs))
        assert ("pos_embed" in params) == (positions == "learned")
    jax.tree.map(np.testing.assert_array_equal, *outputs)


def test_positions_of_another_grid(store, tmp_path):
    """Learned ones are resized, sin-cos ones computed for the grid of the run."""
    weights = random_weights(width=24, heads=2, depth=3, mlp_width=96, preprocess=Preprocess())
    path = written(tmp_path, weights, "safetensors")
    run = start_from(store, path, model={"positions": "learned", "image_size": 24})
    start = tasks.open_task(run).initial_weights()
    assert start.params["pos_embed"].shape == (1, 37, 24)
    np.testing.assert_array_equal(
        start.params["pos_embed"][:, 0], weights.params["pos_embed"][:, 0]
    )
    assert any("4² to 6²" in note for note in start.notes)
    weights.params["pos_embed"] = segments.sincos_table(24, 4)
    path = written(tmp_path / "sincos", weights, "safetensors")
    start = tasks.open_task(start_from(store, path, model={"image_size": 24})).initial_weights()
    assert set(start.params) == {"encoder"}


@pytest.mark.slow
def test_layer_decay_of_pretraining(store):
    """Decoders have the full rate, positions no weight decay."""
    run = settings(
        store, model={"positions": "learned"}, optim={"layer_decay": 0.5, "weight_decay": 0.1}
    )
    task = tasks.open_task(run)
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
    tx = task.optimizer(lambda _: 1.0)
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params, value=0.0)
    updates = mapping.flatten(updates)  # of weight decay only
    kernel = updates["encoder/blocks/attn/qkv/kernel"]
    np.testing.assert_allclose(
        -kernel.reshape(3, -1)[:, 0], 0.1 * 0.5 ** np.array([3, 2, 1]), rtol=1e-6
    )
    np.testing.assert_allclose(-updates["encoder/patch_embed/kernel"], 0.1 * 0.5**4, rtol=1e-6)
    np.testing.assert_allclose(-updates["next/pred/kernel"], 0.1, rtol=1e-6)
    assert not np.any(updates["pos_embed"]) and not np.any(updates["encoder/patch_embed/bias"])
    assert optimizer.DECAY[-1] == (r".*", True)


BASE = dict(width=24, heads=2, depth=3, mlp_width=96, preprocess=Preprocess())
LEARNED = {"positions": "learned"}
# {case: (changes of the encoder, of the config, message)}
CONTRADICTIONS = {
    "sizes": (
        dict(width=48, heads=3, depth=2), dict(model=LEARNED),
        r"model.width 48 \(config: 24\), model.depth 2 \(config: 3\), model.heads 3 \(config: 2\), "
        r"model.mlp_ratio .*--config.model.width=48 --config.model.depth=2 --config.model.heads=3",
    ),
    "activation": (
        dict(activation="gelu_tanh"), dict(model=LEARNED), "--config.model.activation=gelu_tanh$",
    ),
    "patch": (dict(patch=2, image_size=8), dict(model=LEARNED), "--config.model.patch=2$"),
    "mean": (
        dict(preprocess=Preprocess(mean=(0.5, 0.25, 0.5))), dict(model=LEARNED),
        "--config.data.mean=0.5,0.25,0.5$",
    ),
    "positions": ({}, {}, "learned positions.*--config.model.positions=learned$"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_name_the_flags(store, tmp_path, case):
    changes, config, message = CONTRADICTIONS[case]
    path = written(tmp_path, random_weights(**(BASE | changes)), "safetensors")
    with pytest.raises(UserError, match=message) as error:
        tasks.open_task(start_from(store, path, **config)).initial_weights()
    assert "\n" not in str(error.value)


def test_the_flags_of_an_error_are_valid(store, tmp_path):
    weights = random_weights(**(BASE | dict(width=48, heads=3, eps=1e-5, mlp_width=100)))
    weights = dataclasses.replace(weights, preprocess=Preprocess(std=(0.5, 0.25, 0.5)))
    path = written(tmp_path, weights, "safetensors")
    with pytest.raises(UserError) as error:
        tasks.open_task(start_from(store, path, model=LEARNED)).initial_weights()
    changes = {"model": dict(LEARNED), "data": {}}
    for flag in str(error.value).split(": set ")[1].split():
        section, name = flag.removeprefix("--config.").partition("=")[0].split(".")
        text = flag.partition("=")[2]
        changes[section][name] = eval(text) if section == "data" else type_of(name)(text)
    assert tasks.open_task(start_from(store, path, **changes)).initial_weights().identity


def type_of(name: str) -> type:
    return float if name in ("eps", "mlp_ratio") else int


@pytest.mark.parametrize(
    "model,changes,message",
    [
        (dict(decoder_width=32), {}, "decoder_width 32.*--config.init.decoders=fresh"),
        (dict(taps=(1, 3)), {}, "taps .*--config.model.taps=1,3"),
        ({}, dict(out_width=8), "targets of width 8.*width 24.*--config.init.decoders=fresh"),
    ],
)
def test_other_decoders_are_refused(store, tmp_path, model, changes, message):
    weights = pretraining_model(**changes, **model)
    path = written(tmp_path, weights, "safetensors")
    with pytest.raises(UserError, match=message):
        tasks.open_task(start_from(store, path)).initial_weights()
    fresh = start_from(store, path, init={"decoders": "fresh"})
    assert set(tasks.open_task(fresh).initial_weights().params) == {"encoder"}


# Arrays of architectures that encoders here do not have, in timm's names.
UNSUPPORTED = {
    "registers": "reg_token",
    "norm before the blocks": "norm_pre.weight",
    "rotary positions": "rope.periods",
    "gated MLP": "blocks.0.mlp.fc1_g.weight",
    "norm of queries": "blocks.0.attn.q_norm.weight",
}


@pytest.mark.parametrize("name", UNSUPPORTED.values(), ids=list(UNSUPPORTED))
def test_unsupported_arrays_are_refused_by_name(store, tmp_path, name):
    path, _ = published_encoders.timm(tmp_path)
    state = files.read_state(path)
    files.write_safetensors(path, state | {name: np.zeros(24, np.float32)}, {})
    with pytest.raises(UserError, match=f"unknown {name}"):
        tasks.open_task(start_from(store, path, model=LEARNED)).initial_weights()


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(init={"freeze_blocks": 4}), "freeze_blocks 4 .*depth 3"),
        (dict(init={"freeze_steps": "3 steps"}), "freeze_steps needs"),
        (dict(init={"freeze_steps": "3 eons", "freeze_blocks": 1}), "config.init.freeze_steps"),
        (dict(init={"freeze_blocks": 1, "weights": ""}), "need config.init.weights"),
        (dict(init={"freeze_positions": True}), "positions=learned"),
        (dict(init={"decoders": "some"}), "config.init.decoders must be one of auto, fresh"),
        (dict(model={"positions": "rope"}), "config.model.positions must be one of"),
        (dict(task="classify", model=LEARNED), "config.task=pretrain"),
        (dict(task="classify", init={"decoders": "fresh"}), "config.task=pretrain"),
        (
            dict(
                task="classify",
                init={"freeze_blocks": 1},
                classify={"trainable": "head", "mixup_group_size": 4},
            ),
            "trainable=all",
        ),
    ],
)
def test_options_that_do_not_fit_together(changes, message):
    with pytest.raises(UserError, match=message):
        start_from("x", "y", **changes)
