"""The encoder in use against timm's VisionTransformer."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from dgpt_jax.convert import formats, layout, timm
from dgpt_jax.convert.weights import Weights, encoder_shapes
from dgpt_jax.schema import UserError, parse
from dgpt_jax.sections import SIZES, Model
from tests.conversions import random_weights
from tests.paths import GOLDEN


@pytest.mark.parametrize("name,pooling", [("avg", "mean"), ("token", "cls")])
def test_timm_logits(name, pooling):
    file = GOLDEN / f"timm_vit_tiny_{name}.safetensors"
    expected = np.load(GOLDEN / f"timm_vit_tiny_{name}_expected.npz")
    found, weights = formats.read(file, heads=3)
    assert (found.name, weights.pooling, weights.num_classes) == ("timm", pooling, 10)
    module = weights.module()
    images = np.random.default_rng(13).standard_normal((2, 3, 32, 32)).astype(np.float32)
    images = images.transpose(0, 2, 3, 1)
    variables = {"params": layout.unflatten(weights.params)}
    tokens = jax.jit(lambda x: module.apply(variables, x, method="tokens"))(images)
    np.testing.assert_allclose(tokens, expected["features"], atol=1e-4)
    logits = jax.jit(lambda x: module.apply(variables, x))(images)
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
    written, state = layout.write(found.table(weights), weights.params), load_file(file)
    assert set(written) == set(state)
    for key in state:
        np.testing.assert_array_equal(written[key], state[key])


@pytest.mark.parametrize("size", SIZES)
def test_names_and_shapes_are_timms(size):
    model = parse(Model, {"size": size})
    shapes = encoder_shapes(model, "mean", 0)
    params = {path: np.broadcast_to(np.float32(0), shape) for path, shape in shapes.items()}
    weights = Weights(model, params, "mean", "zeros")
    written = layout.write(timm.LAYOUT.table(weights), params)
    golden = json.loads((GOLDEN / "timm_vit_shapes.json").read_text())
    assert {k: list(v.shape) for k, v in written.items()} == golden[timm.NAMES[size]]
    assert timm.config_json(weights)["architecture"] == timm.NAMES[size]


def timm_directory(path, pooling="cls", **told):
    """A directory as timm's: weights of random_weights with another config.json."""
    path.mkdir()
    weights = random_weights(pooling, width=192)
    formats.LAYOUTS["timm"].save(weights, path)
    (path / "config.json").write_text(json.dumps(told))
    return path


def test_heads_by_the_name_of_the_architecture(tmp_path):
    """As in files from the hub, which have no model_args; the words stand for one width each."""
    path = timm_directory(tmp_path / "a", architecture="vit_tiny_patch16_384.augreg_in21k")
    assert formats.read(path)[1].model.heads == 3
    with pytest.raises(UserError, match="4 heads are given, its config.json says 3"):
        formats.read(path, heads=4)
    for name in ("vit_base_patch16_384", "vit_little_patch16_256", "eva02_tiny_patch14_224"):
        path = timm_directory(tmp_path / name, architecture=name)
        with pytest.raises(UserError, match="give it with --heads"):
            formats.read(path)


@pytest.mark.parametrize("pooling,told,usual", [("cls", "avg", "token"), ("mean", "token", "avg")])
def test_a_norm_elsewhere_than_the_pooling_says(tmp_path, pooling, told, usual):
    """timm's fc_norm=True or False with the other pooling: the names alone would mislead."""
    args = {"num_heads": 3, "dynamic_img_size": True}
    path = timm_directory(tmp_path / "a", pooling, model_args=args, global_pool=told)
    with pytest.raises(UserError, match=f"norm with global_pool {told}"):
        formats.read(path)
    path = timm_directory(tmp_path / "b", pooling, model_args=args, global_pool=usual)
    assert formats.read(path)[1].pooling == pooling
