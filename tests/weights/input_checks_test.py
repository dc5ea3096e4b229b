"""Arrays that mean something else are refused by what they are and what is taken."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgpt_jax import maps
from dgpt_jax.schema import UserError
from tests import load_test
from tests.load_test import MODEL, images, normalised, orders, tokens

ENCODER, CLASSIFIER, DIGPT = load_test.encoder(), load_test.classifier(), load_test.pretrained()
TAKE_PICTURES = {
    "features": ENCODER.features,
    "tokens": ENCODER.tokens,
    "pooled": lambda x: ENCODER.pooled(x, ("cls",)),
    "logits": CLASSIFIER.logits,
    "classifier.features": CLASSIFIER.features,
    "cls_attention": lambda x: maps.cls_attention(ENCODER, x),
    "last_attention": lambda x: maps.last_attention(ENCODER, x),
    "prediction_maps": lambda x: maps.prediction_maps(DIGPT, x, tokens(2), orders(2), True),
}
NAN = np.where(np.arange(3) == 1, np.nan, images(2).astype(np.float32))
NO_PICTURES = {
    "0 to 1": (images(2) / np.float32(255), "from 0 to 1: multiply by 255"),
    "normalised": (normalised(2), "pictures are float32 (2, 16, 16, 3), from -"),
    "too large": (images(2) * 257.0, "float64 (2, 16, 16, 3), from 0 to 6.55e+04"),
    "uint16": (images(2).astype(np.uint16), "pictures are uint16 (2, 16, 16, 3), of another dtype"),
    "int32": (images(2).astype(np.int32), "pictures are int32"),
    "bool": (images(2) > 127, "pictures are bool"),
    "size": (np.zeros((2, 32, 32, 3), np.uint8), "(2, 32, 32, 3), not the model's 16 pixels"),
    "not square": (np.zeros((2, 16, 32, 3), np.uint8), "not the model's 16 pixels"),
    "NCHW": (images(2).transpose(0, 3, 1, 2), "channels first: give x.transpose(0, 2, 3, 1)"),
    "one image": (images(1)[0], "uint8 (16, 16, 3), without a batch axis: give x[None]"),
    "empty": (images(0), "(0, 16, 16, 3), an empty batch"),
    "grey": (images(2)[..., :1], "(2, 16, 16, 1), of another shape"),
    "RGBA": (np.zeros((2, 16, 16, 4), np.uint8), "(2, 16, 16, 4), of another shape"),
    "scalar": (np.uint8(0), "uint8 (), of another shape"),
    "NaN": (NAN, "not finite in 2 of 2"),
    "infinite": (np.full((2, 16, 16, 3), np.inf, np.float32), "not finite in 2 of 2"),
    "list": ([[1, 2], [3]], "pictures are no array"),
    "on the device": (jnp.asarray(images(2) / 255), "from 0 to 1: multiply by 255"),
    "bfloat16": (jnp.asarray(images(2) / 255, jnp.bfloat16), "from 0 to 1: multiply by 255"),
}
TAKEN = "uint8 or float 0-255, RGB, of shape (B, 16, 16, 3)"


@pytest.mark.parametrize("function", TAKE_PICTURES)
@pytest.mark.parametrize("case", NO_PICTURES)
def test_what_are_no_pictures(function, case):
    x, message = NO_PICTURES[case]
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        TAKE_PICTURES[function](x)
    assert TAKEN in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "x", [images(2).astype(np.float32), images(2).astype(np.float64), jnp.asarray(images(2)),
          images(2).astype(np.float16)],
    ids=["float32", "float64", "on the device", "float16"],
)  # fmt: skip
def test_floats_of_the_same_values_give_the_same(x):
    np.testing.assert_array_equal(ENCODER.features(x), ENCODER.features(images(2)))


def test_black_is_the_same_in_all_units():
    black = np.zeros((1, 16, 16, 3), np.float32)
    np.testing.assert_array_equal(ENCODER.features(black), ENCODER.features(black.astype("uint8")))


@pytest.mark.parametrize("name", ["CLS", "Mean", "avg", "", None])
def test_poolings(name):
    with pytest.raises(UserError, match="pooling must be one of cls, mean, got"):
        ENCODER.features(images(2), name)
    with pytest.raises(UserError, match="pooling must be one of cls, mean, got"):
        ENCODER.pooled(images(2), ["cls", name])
    with pytest.raises(UserError, match="pooling must be one of cls, mean, got"):
        ENCODER.pooled(images(2), [])
    assert list(ENCODER.pooled(images(2), "mean")) == ["mean"]


IMAGES, TOKENS, ORDERS = normalised(2), tokens(2), orders(2)
TWICE = np.array([[0, 1, 2, 3], [0, 1, 1, 3]])
NO_INPUTS = {
    "raw images": ((images(2), TOKENS, ORDERS), "images are uint8 (2, 16, 16, 3), of another"),
    "raw floats": ((images(2) * 1.0, TOKENS, ORDERS), "from 0 to 255"),
    "NaN image": ((IMAGES * np.nan, TOKENS, ORDERS), "images are float32 (2, 16, 16, 3), not fin"),
    "NCHW": ((IMAGES.transpose(0, 3, 1, 2), TOKENS, ORDERS), "channels first"),
    "one image": ((IMAGES[0], TOKENS, ORDERS), "without a batch axis"),
    "stored tokens": ((IMAGES, TOKENS.astype(np.int8), ORDERS), "tokens are int8 (2, 17, 7)"),
    "tokens' width": ((IMAGES, TOKENS[..., :6], ORDERS), "float, of shape (B, 1 + side², 7)"),
    "no CLS": ((IMAGES, TOKENS[:, 1:], ORDERS), "15 patches, which are no square (cls=True)"),
    "one's tokens": ((IMAGES, TOKENS[0], ORDERS), "tokens are float32 (17, 7), of another shape"),
    "NaN token": ((IMAGES, TOKENS * np.nan, ORDERS), "tokens are float32 (2, 17, 7), not finite"),
    "float orders": ((IMAGES, TOKENS, ORDERS * 1.0), "orders are float64 (2, 4), of another dtype"),
    "bool orders": ((IMAGES, TOKENS, ORDERS > 1), "orders are bool (2, 4), of another dtype"),
    "short orders": ((IMAGES, TOKENS, ORDERS[:, :3]), "orders are int64 (2, 3), of another shape"),
    "from 1": ((IMAGES, TOKENS, ORDERS + 1), "2 are no permutations, row 0"),
    "twice": ((IMAGES, TOKENS, TWICE), "1 are no permutations, row 1: [0, 1, 1, 3]"),
}


@pytest.mark.parametrize("case", NO_INPUTS)
def test_what_the_pretraining_model_does_not_take(case):
    (x, t, o), message = NO_INPUTS[case]
    with pytest.raises(UserError, match=re.escape(message)):
        DIGPT.losses(x, t, o)
    if t is TOKENS:
        with pytest.raises(UserError, match=re.escape(message)):
            DIGPT.predictions(x, o)
    if x is IMAGES:
        with pytest.raises(UserError, match=re.escape(message)):
            maps.prediction_maps(DIGPT, images(2), t, o, True)


def test_traced_arrays_are_checked_by_shape_and_dtype():
    traced = jax.jit(ENCODER.features)
    found = traced(images(2) / np.float32(255))  # whatever the values are
    assert found.shape == (2, MODEL.width)
    for case in ("uint16", "size", "NCHW", "one image", "empty", "bool"):
        with pytest.raises(UserError, match=re.escape(NO_PICTURES[case][1])):
            traced(NO_PICTURES[case][0])
    assert jax.grad(lambda x: ENCODER.features(x).sum())(images(2) * 1.0).shape == (2, 16, 16, 3)
    assert set(jax.jit(DIGPT.losses)(IMAGES, TOKENS, ORDERS)) == {"next", "visible"}
    with pytest.raises(UserError, match="of another shape"):
        jax.jit(DIGPT.losses)(IMAGES, TOKENS, ORDERS[:, :3])
    rows = jax.vmap(lambda x: ENCODER.features(x[None])[0])(jnp.asarray(images(2)))
    assert rows.shape == (2, MODEL.width)
