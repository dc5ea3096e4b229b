"""The encoder in use against timm's VisionTransformer."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from dgpt_jax.config import SIZES, Model
from dgpt_jax.convert import formats, layout, timm
from dgpt_jax.convert.weights import Weights, encoder_shapes
from dgpt_jax.schema import parse
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
