"""The classifier compared with timm's VisionTransformer."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from dgpt_jax.config import ModelConfig
from dgpt_jax.config.model import SIZES
from dgpt_jax.config.schema import parse
from dgpt_jax.errors import UserError
from dgpt_jax.weights import mapping, registry
from dgpt_jax.weights.layouts import timm
from dgpt_jax.weights.types import Weights, encoder_shapes
from tests.support.conversions import random_weights
from tests.support.paths import GOLDEN


@pytest.mark.parametrize("name,pooling", [("avg", "mean"), ("token", "cls")])
def test_timm_logits(name, pooling):
    file = GOLDEN / f"timm_vit_tiny_{name}.safetensors"
    expected = np.load(GOLDEN / f"timm_vit_tiny_{name}_expected.npz")
    layout, weights = registry.read(file, heads=3)
    assert (layout.name, weights.pooling, weights.num_classes) == ("timm", pooling, 10)
    module = weights.module()
    images = np.random.default_rng(13).standard_normal((2, 3, 32, 32)).astype(np.float32)
    images = images.transpose(0, 2, 3, 1)
    variables = {"params": mapping.unflatten(weights.params)}
    tokens = jax.jit(lambda x: module.apply(variables, x, method="tokens"))(images)
    np.testing.assert_allclose(tokens, expected["features"], atol=1e-4)
    logits = jax.jit(lambda x: module.apply(variables, x))(images)
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
    written, state = mapping.write(layout.table(weights), weights.params), load_file(file)
    assert set(written) == set(state)
    for key in state:
        np.testing.assert_array_equal(written[key], state[key])


@pytest.mark.parametrize("size", SIZES)
def test_names_and_shapes_are_timms(size):
    model = parse(ModelConfig, {"size": size})
    shapes = encoder_shapes(model, "mean", 0)
    params = {path: np.broadcast_to(np.float32(0), shape) for path, shape in shapes.items()}
    weights = Weights(model, params, "mean", "zeros")
    written = mapping.write(timm.LAYOUT.table(weights), params)
    golden = json.loads((GOLDEN / "timm_vit_shapes.json").read_text())
    assert {k: list(v.shape) for k, v in written.items()} == golden[timm.NAMES[size]]
    assert timm.config_json(weights)["architecture"] == timm.NAMES[size]


def timm_directory(path, pooling="cls", **config):
    """A directory in timm's layout: random weights with another config.json."""
    path.mkdir()
    weights = random_weights(pooling, width=192)
    registry.LAYOUTS["timm"].save(weights, path)
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_heads_from_the_name_of_the_architecture(tmp_path):
    """Files from the hub have no model_args; each size name stands for one width."""
    path = timm_directory(tmp_path / "a", architecture="vit_tiny_patch16_384.augreg_in21k")
    assert registry.read(path)[1].model.heads == 3
    with pytest.raises(UserError, match="4.* 3"):
        registry.read(path, heads=4)
    for name in ("vit_base_patch16_384", "vit_little_patch16_256", "eva02_tiny_patch14_224"):
        path = timm_directory(tmp_path / name, architecture=name)
        with pytest.raises(UserError, match="--heads"):
            registry.read(path)


@pytest.mark.parametrize("pooling,other,usual", [("cls", "avg", "token"), ("mean", "token", "avg")])
def test_a_norm_that_contradicts_the_pooling(tmp_path, pooling, other, usual):
    """timm's fc_norm=True or False with the other pooling: array names alone would mislead."""
    args = {"num_heads": 3, "dynamic_img_size": True}
    path = timm_directory(tmp_path / "a", pooling, model_args=args, global_pool=other)
    with pytest.raises(UserError, match=f"norm.*global_pool.*{other}"):
        registry.read(path)
    path = timm_directory(tmp_path / "b", pooling, model_args=args, global_pool=usual)
    assert registry.read(path)[1].pooling == pooling
