"""Errors for invalid array arguments state the actual and the expected array."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgpt_jax.errors import UserError
from dgpt_jax.evals import feature_maps
from tests.weights import api_test as load_test
from tests.weights.api_test import MODEL, images, normalized, orders, tokens

ENCODER, CLASSIFIER, DIGPT = load_test.encoder(), load_test.classifier(), load_test.pretrained()
FUNCTIONS = {
    "features": ENCODER.features,
    "tokens": ENCODER.tokens,
    "pooled": lambda x: ENCODER.pooled(x, ("cls",)),
    "logits": CLASSIFIER.logits,
    "classifier.features": CLASSIFIER.features,
    "cls_attention": lambda x: feature_maps.cls_attention(ENCODER, x),
    "last_attention": lambda x: feature_maps.last_attention(ENCODER, x),
    "prediction_maps": lambda x: feature_maps.prediction_maps(DIGPT, x, tokens(2), orders(2), True),
}
NAN = np.where(np.arange(3) == 1, np.nan, images(2).astype(np.float32))
INVALID_IMAGES = {
    "0 to 1": (images(2) / np.float32(255), "0 to 1: multiply by 255"),
    "normalized": (normalized(2), "float32 (2, 16, 16, 3)"),
    "too large": (images(2) * 257.0, "0 to 6.55e+04"),
    "uint16": (images(2).astype(np.uint16), "uint16 (2, 16, 16, 3)"),
    "int32": (images(2).astype(np.int32), "int32 (2, 16, 16, 3)"),
    "bool": (images(2) > 127, "bool (2, 16, 16, 3)"),
    "size": (np.zeros((2, 32, 32, 3), np.uint8), "16 pixels"),
    "not square": (np.zeros((2, 16, 32, 3), np.uint8), "16 pixels"),
    "NCHW": (images(2).transpose(0, 3, 1, 2), "x.transpose(0, 2, 3, 1)"),
    "one image": (images(1)[0], "x[None]"),
    "empty": (images(0), "(0, 16, 16, 3)"),
    "gray": (images(2)[..., :1], "(2, 16, 16, 1)"),
    "RGBA": (np.zeros((2, 16, 16, 4), np.uint8), "(2, 16, 16, 4)"),
    "scalar": (np.uint8(0), "uint8 ()"),
    "NaN": (NAN, "not finite in 2 of 2"),
    "infinite": (np.full((2, 16, 16, 3), np.inf, np.float32), "not finite in 2 of 2"),
    "list": ([[1, 2], [3]], "images"),
    "on the device": (jnp.asarray(images(2) / 255), "0 to 1: multiply by 255"),
    "bfloat16": (jnp.asarray(images(2) / 255, jnp.bfloat16), "0 to 1: multiply by 255"),
}
EXPECTED = "uint8 or float 0-255, RGB, of shape (B, 16, 16, 3)"


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("case", INVALID_IMAGES)
def test_invalid_images(function, case):
    x, message = INVALID_IMAGES[case]
    with pytest.raises(UserError, match=re.escape(message)) as error:
        FUNCTIONS[function](x)
    assert EXPECTED in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "x", [images(2).astype(np.float32), images(2).astype(np.float64), jnp.asarray(images(2)),
          images(2).astype(np.float16)],
    ids=["float32", "float64", "on the device", "float16"],
)  # fmt: skip
def test_results_do_not_depend_on_the_dtype(x):
    np.testing.assert_array_equal(ENCODER.features(x), ENCODER.features(images(2)))


def test_black_images():
    black = np.zeros((1, 16, 16, 3), np.float32)
    np.testing.assert_array_equal(ENCODER.features(black), ENCODER.features(black.astype("uint8")))


@pytest.mark.parametrize("name", ["CLS", "Mean", "avg", "", None])
def test_poolings(name):
    with pytest.raises(UserError, match="pooling.* cls, mean"):
        ENCODER.features(images(2), name)
    with pytest.raises(UserError, match="pooling.* cls, mean"):
        ENCODER.pooled(images(2), ["cls", name])
    with pytest.raises(UserError, match="pooling.* cls, mean"):
        ENCODER.pooled(images(2), [])
    assert list(ENCODER.pooled(images(2), "mean")) == ["mean"]


IMAGES, TOKENS, ORDERS = normalized(2), tokens(2), orders(2)
REPEATED = np.array([[0, 1, 2, 3], [0, 1, 1, 3]])
INVALID_INPUTS = {
    "raw images": ((images(2), TOKENS, ORDERS), "images are uint8 (2, 16, 16, 3)"),
    "raw floats": ((images(2) * 1.0, TOKENS, ORDERS), "0 to 255"),
    "NaN image": ((IMAGES * np.nan, TOKENS, ORDERS), "images are float32 (2, 16, 16, 3), not fin"),
    "NCHW": ((IMAGES.transpose(0, 3, 1, 2), TOKENS, ORDERS), "channels first"),
    "one image": ((IMAGES[0], TOKENS, ORDERS), "x[None]"),
    "stored tokens": ((IMAGES, TOKENS.astype(np.int8), ORDERS), "tokens are int8 (2, 17, 7)"),
    "tokens' width": ((IMAGES, TOKENS[..., :6], ORDERS), "float, of shape (B, 1 + side², 7)"),
    "no CLS": ((IMAGES, TOKENS[:, 1:], ORDERS), "15 patches"),
    "one's tokens": ((IMAGES, TOKENS[0], ORDERS), "tokens are float32 (17, 7)"),
    "NaN token": ((IMAGES, TOKENS * np.nan, ORDERS), "tokens are float32 (2, 17, 7), not finite"),
    "float orders": ((IMAGES, TOKENS, ORDERS * 1.0), "orders are float64 (2, 4)"),
    "bool orders": ((IMAGES, TOKENS, ORDERS > 1), "orders are bool (2, 4)"),
    "short orders": ((IMAGES, TOKENS, ORDERS[:, :3]), "orders are int64 (2, 3)"),
    "from 1": ((IMAGES, TOKENS, ORDERS + 1), "row 0"),
    "repeated": ((IMAGES, TOKENS, REPEATED), "row 1 is [0, 1, 1, 3]"),
}


@pytest.mark.parametrize("case", INVALID_INPUTS)
def test_invalid_inputs_of_the_pretraining_model(case):
    (x, t, o), message = INVALID_INPUTS[case]
    with pytest.raises(UserError, match=re.escape(message)):
        DIGPT.losses(x, t, o)
    if t is TOKENS:
        with pytest.raises(UserError, match=re.escape(message)):
            DIGPT.predictions(x, o)
    if x is IMAGES:
        with pytest.raises(UserError, match=re.escape(message)):
            feature_maps.prediction_maps(DIGPT, images(2), t, o, True)


def test_traced_arrays_are_checked_by_shape_and_dtype():
    traced = jax.jit(ENCODER.features)
    features = traced(images(2) / np.float32(255))  # values are not checked
    assert features.shape == (2, MODEL.width)
    for case in ("uint16", "size", "NCHW", "one image", "empty", "bool"):
        with pytest.raises(UserError, match=re.escape(INVALID_IMAGES[case][1])):
            traced(INVALID_IMAGES[case][0])
    assert jax.grad(lambda x: ENCODER.features(x).sum())(images(2) * 1.0).shape == (2, 16, 16, 3)
    assert set(jax.jit(DIGPT.losses)(IMAGES, TOKENS, ORDERS)) == {"next", "visible"}
    with pytest.raises(UserError, match=r"orders.*\(2, 3\)"):
        jax.jit(DIGPT.losses)(IMAGES, TOKENS, ORDERS[:, :3])
    rows = jax.vmap(lambda x: ENCODER.features(x[None])[0])(jnp.asarray(images(2)))
    assert rows.shape == (2, MODEL.width)
