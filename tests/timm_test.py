"""The encoder in use against timm's VisionTransformer."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from dgpt_jax import heads
from dgpt_jax.config import SIZES, Model
from dgpt_jax.convert import layout, timm
from dgpt_jax.schema import parse
from tests.paths import GOLDEN


def abstract(module, model):
    images = np.zeros((1, model.image_size, model.image_size, 3), np.float32)
    params = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    return {path: leaf.shape for path, leaf in layout.flatten(params).items()}


@pytest.mark.parametrize("name,pooling", [("avg", "mean"), ("token", "cls")])
def test_timm_logits(name, pooling):
    state = load_file(GOLDEN / f"timm_vit_tiny_{name}.safetensors")
    expected = np.load(GOLDEN / f"timm_vit_tiny_{name}_expected.npz")
    model = timm.model_of(state, {"model_args": {"num_heads": 3}})
    assert timm.pooling_of(state) == pooling
    module = heads.classifier(model, pooling, num_classes=10)
    params = timm.read(state, model.depth, pooling, abstract(module, model))
    images = np.random.default_rng(13).standard_normal((2, 3, 32, 32)).astype(np.float32)
    images = images.transpose(0, 2, 3, 1)
    variables = {"params": layout.unflatten(params)}
    tokens = jax.jit(lambda x: module.apply(variables, x, method="tokens"))(images)
    np.testing.assert_allclose(tokens, expected["features"], atol=1e-4)
    logits = jax.jit(lambda x: module.apply(variables, x))(images)
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
    written = timm.write(params, model.depth, pooling)
    assert set(written) == set(state)
    for key in state:
        np.testing.assert_array_equal(written[key].reshape(state[key].shape), state[key])


@pytest.mark.parametrize("size", SIZES)
def test_names_and_shapes_are_timms(size):
    model = parse(Model, {"size": size})
    shapes = abstract(heads.classifier(model, "mean"), model)
    params = {path: np.broadcast_to(np.float32(0), shape) for path, shape in shapes.items()}
    ours = {k: list(v.shape) for k, v in timm.write(params, model.depth, "mean").items()}
    golden = json.loads((GOLDEN / "timm_vit_shapes.json").read_text())
    assert ours == golden[timm.NAMES[size]]
    assert timm.config_json(model, "mean")["architecture"] == timm.NAMES[size]
