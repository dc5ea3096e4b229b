"""The model against the official implementation, causality by gradient, sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dgpt_jax.config import ModelConfig
from dgpt_jax.config.model import SIZES
from dgpt_jax.config.schema import parse
from dgpt_jax.data import segments
from dgpt_jax.models import digpt, vit
from dgpt_jax.weights import mapping
from dgpt_jax.weights.layouts import digpt as official
from dgpt_jax.weights.types import Weights
from tests.support.paths import GOLDEN


@pytest.fixture(scope="module")
def golden():
    """(model config, module, params, inputs, expected) of the official tiny model."""
    state = load_file(GOLDEN / "digpt_tiny.safetensors")
    model = official.model_of(state, heads=3, decoder_heads=2)
    module = digpt.build(model, out_width=1024)
    shapes = mapping.flatten(abstract_params(model, out_width=1024))
    params = official.read(state, model, {k: v.shape for k, v in shapes.items()})
    rng = np.random.default_rng(7)
    images = rng.standard_normal((2, 3, 224, 224)).astype(np.float32).transpose(0, 2, 3, 1)
    tokens = rng.standard_normal((2, 257, 1024)).astype(np.float32)
    expected = np.load(GOLDEN / "digpt_tiny_expected.npz")
    inputs = (images, tokens, expected["perm"].astype(np.int32))
    return model, module, mapping.unflatten(params), inputs, expected


def abstract_params(model, out_width, decoders=("next", "visible")):
    module = digpt.build(model, out_width=out_width, decoders=decoders)
    key = jax.random.key(0)
    return jax.eval_shape(module.init, key, *digpt.dummy_inputs(model))["params"]


def compute_losses(module, model, params, images, tokens, order):
    predictions = module.apply({"params": params}, images, order)
    grid = (model.grid, model.grid)
    return digpt.token_losses(
        predictions, tokens, order, grid=grid, segment_grid=model.segments, cls=True
    )


@pytest.mark.smoke
def test_official_losses_and_gradients(golden):
    model, module, params, inputs, expected = golden

    def total(params):
        losses = {k: v.mean() for k, v in compute_losses(module, model, params, *inputs).items()}
        return losses["next"] + losses["visible"], losses

    (_, losses), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    np.testing.assert_allclose(losses["next"], expected["next_loss"], rtol=1e-5)
    np.testing.assert_allclose(losses["visible"], expected["visible_loss"], rtol=1e-5)
    grads = official.write(mapping.flatten(grads), model)
    names = [k.removeprefix("grad_norm/") for k in expected if k.startswith("grad_norm/")]
    assert len(names) == 253
    for name in names:
        norm = np.linalg.norm(grads[name].astype(np.float64))
        np.testing.assert_allclose(norm, expected[f"grad_norm/{name}"], rtol=1e-3, err_msg=name)


def test_official_features_and_predictions(golden):
    model, module, params, (images, _, order), expected = golden
    encode = jax.jit(lambda *a: module.apply({"params": params}, *a, method="encode")[0])
    for depth, tap in zip(model.taps, encode(images, order), strict=True):
        np.testing.assert_allclose(tap, expected[f"block{depth}"], atol=1e-4)
    predictions = jax.jit(lambda *a: module.apply({"params": params}, *a))(images, order)
    for name in ("next", "visible"):
        np.testing.assert_allclose(predictions[name][..., :64], expected[f"{name}_pred"], atol=1e-4)


def test_official_mask_and_positions(golden):
    model, *_, expected = golden
    fixed = official.fixed_arrays(model)
    np.testing.assert_array_equal(fixed["mask"], expected["mask"])
    np.testing.assert_allclose(fixed["pos_embed"], expected["pos_embed"], atol=1e-6)


def test_official_layout_round_trip(golden):
    model, _, params, *_ = golden
    state = load_file(GOLDEN / "digpt_tiny.safetensors")
    written = official.write(mapping.flatten(params), model)
    assert set(written) == set(state)
    for name in set(state) - set(official.FIXED):
        np.testing.assert_array_equal(written[name], state[name].reshape(written[name].shape))


# Trainable parameters of the encoder and of the full pretraining model with C = 1024.
PARAMETERS = {
    "Ti/16": (5_486_208, 77_937_024),
    "S/16": (21_589_248, 97_186_560),
    "B/16": (85_645_824, 167_536_128),
    "L/16": (303_097_856, 389_183_488),
    "L/14": (302_913_536, 388_999_168),
    "H/14": (630_433_280, 720_714_240),
}


def count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_all_sizes_have_a_parameter_count():
    assert set(PARAMETERS) == set(SIZES)


@pytest.mark.parametrize("size", PARAMETERS)
def test_parameter_counts(size):
    params = abstract_params(parse(ModelConfig, {"size": size}), out_width=1024)
    assert (count(params["encoder"]), count(params)) == PARAMETERS[size]


TINY = dict(width=24, depth=3, heads=2, decoder_width=16, decoder_depth=2, decoder_heads=2)


def pixel_gradients(model, order, seed=0):
    """{name: (V+1, S)}: largest |d prediction / d pixels of the segment of rank j in the order|.

    Rows are the predicted segments, then the prediction of CLS.
    """
    module = digpt.build(model, out_width=8, decoders=("next", "visible", "direct"))
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((1, model.image_size, model.image_size, 3)).astype(np.float32)
    params = jax.jit(module.init)(jax.random.key(seed), images, order[None])["params"]
    # Perturb all initial values: zero biases and a zero CLS token could hide a leak.
    leaves, treedef = jax.tree.flatten(params)
    leaves = [x + 0.1 * rng.standard_normal(x.shape).astype(np.float32) for x in leaves]
    params = jax.tree.unflatten(treedef, leaves)
    visible = segments.visible_count(model.segments)

    @jax.jit
    @jax.grad
    def gradient(images, weights):
        predictions = module.apply({"params": params}, images, order[None])
        total = 0.0
        for name, prediction in predictions.items():
            rows = jnp.sin(prediction[0, :-1].reshape(visible, -1)).sum(axis=1)
            rows = jnp.append(rows, jnp.sin(prediction[0, -1]).sum())
            total += jnp.vdot(rows, weights[name])
        return total

    result = {}
    for name in module.decoders:
        rows = []
        for one_hot in np.eye(visible + 1, dtype=np.float32):
            weights = {n: one_hot * (n == name) for n in module.decoders}
            patches = vit.patchify(gradient(images, weights), model.patch)
            per_segment = np.abs(segments.split(patches, model.segments)[0]).max(axis=(1, 2))
            rows.append(per_segment[order])
        result[name] = np.stack(rows)
    return result


@pytest.mark.parametrize("segment_grid,cls_mask", [((2, 2), "official"), ((1, 3), "self")])
@pytest.mark.parametrize("seed", [0, 1])
def test_causality_by_gradient(segment_grid, cls_mask, seed):
    changes = dict(patch=4, image_size=24, segments=segment_grid, cls_mask=cls_mask)
    model = parse(ModelConfig, TINY | changes)
    order = segments.sample_order(np.random.default_rng(seed), segment_grid)
    total = segments.count(segment_grid)
    visible = np.arange(total)[None, :] <= np.arange(total - 1)[:, None]  # ranks ≤ i
    # Row i of `next` predicts the segment of rank i+1 from ranks ≤ i, row i of the others that of
    # rank i. CLS is predicted from all ranks but the last.
    expected = np.concatenate([visible, visible[-1:]])
    for name, grads in pixel_gradients(model, order, seed).items():
        np.testing.assert_array_equal(grads != 0, expected, err_msg=name)


def test_cls_mask_all_leaks():
    """If all tokens attend to CLS, `next` depends on the segment that it predicts."""
    model = parse(ModelConfig, TINY | dict(patch=4, image_size=24, cls_mask="all"))
    grads = pixel_gradients(model, segments.raster_order((2, 2)))
    assert all((rows[:, :3] != 0).all() and (rows[:, 3] == 0).all() for rows in grads.values())


def test_the_causality_test_detects_a_shifted_mask(monkeypatch):
    model = parse(ModelConfig, TINY | dict(patch=4, image_size=16))
    attention_mask = segments.attention_mask

    def shifted(visible, tokens, cls_mask):
        mask = attention_mask(visible, tokens, cls_mask)
        mask[: -1 - tokens, tokens:-1] |= mask[tokens:-1, tokens:-1]  # one segment ahead
        return mask

    monkeypatch.setattr(segments, "attention_mask", shifted)
    grads = pixel_gradients(model, segments.raster_order((2, 2)))["next"]
    assert grads[0, 1] > 0  # the first prediction depends on the segment that it predicts


@pytest.mark.parametrize(
    "model,teacher_side,cls",
    [
        (dict(image_size=32, patch=4, segments=(2, 2)), 8, True),
        (dict(image_size=24, patch=4, segments=(3, 1)), 9, True),  # 6×6 to 9×9 by segment
        (dict(image_size=24, patch=4, segments=(3, 2)), 8, False),  # 8 does not divide by 3
        (dict(image_size=16, patch=4, segments=(4, 4), taps=(1, 3)), 4, True),
        (dict(image_size=16, patch=4, segments=(1, 1)), 8, True),
    ],
)
def test_any_geometry(model, teacher_side, cls):
    model = parse(ModelConfig, TINY | model)
    decoders = ("next", "visible", "direct") if model.segments != (1, 1) else ("visible", "direct")
    module = digpt.build(model, out_width=6, decoders=decoders)
    rng = np.random.default_rng(0)
    size = model.image_size
    images = rng.standard_normal((2, size, size, 3)).astype(np.float32)
    tokens = rng.standard_normal((2, teacher_side**2 + cls, 6)).astype(np.float32)
    order = np.stack([segments.sample_order(rng, model.segments) for _ in range(2)])
    predictions, _ = jax.jit(module.init_with_output)(jax.random.key(0), images, order)
    grid = (model.grid, model.grid)
    losses = digpt.token_losses(
        predictions, tokens, order, grid=grid, segment_grid=model.segments, cls=cls
    )
    assert set(losses) == set(decoders)
    for value in losses.values():
        assert value.shape == (2,) and np.all((value > 1) & (value < 3))


def test_perfect_predictions_have_zero_loss():
    """Targets have the order of the predictions, for all decoders and several orders."""
    segment_grid, side = (2, 2), 4
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((3, side**2 + 1, 5)).astype(np.float32)
    order = np.stack([segments.sample_order(rng, segment_grid) for _ in range(3)])
    patches = tokens[:, 1:].reshape(3, side, side, 5)
    targets = np.asarray(segments.split(patches, segment_grid))
    targets = np.stack([t[o] for t, o in zip(targets, order, strict=True)])
    predictions = {
        "next": np.concatenate([targets[:, 1:].reshape(3, -1, 5), tokens[:, :1]], axis=1),
        "visible": np.concatenate([targets[:, :-1].reshape(3, -1, 5), tokens[:, :1]], axis=1),
    }
    predictions["direct"] = predictions["visible"]
    geometry = dict(grid=(side, side), segment_grid=segment_grid, cls=True)
    for value in digpt.token_losses(predictions, tokens, order, **geometry).values():
        np.testing.assert_allclose(value, 0, atol=1e-6)
    wrong = digpt.token_losses(predictions, tokens, order[::-1], **geometry)
    assert min(v.max() for v in wrong.values()) > 0.5


def test_distillation_is_one_layer_on_the_last_block():
    """One segment is the full image; weights without a decoder report so."""
    model = parse(ModelConfig, TINY | dict(patch=8, image_size=16, segments=(1, 1)))
    module = digpt.build(model, out_width=6, decoders=("direct",))
    images, order = digpt.dummy_inputs(model)
    images = np.random.default_rng(0).standard_normal(images.shape).astype(np.float32)
    params = jax.jit(module.init)(jax.random.key(0), images, order)["params"]
    assert set(params) == {"encoder", "direct"}
    taps, mask = module.apply({"params": params}, images, order, method="encode")
    assert mask.all() and len(taps) > 1
    last = np.asarray(taps[-1], np.float64)
    normed = last - last.mean(axis=-1, keepdims=True)
    normed /= np.sqrt(np.square(normed).mean(axis=-1, keepdims=True) + 1e-6)
    predictions = module.apply({"params": params}, images, order)["direct"]
    np.testing.assert_allclose(predictions, normed @ params["direct"]["pred"]["kernel"], atol=1e-5)
    weights = Weights(model, mapping.flatten(params), None, "memory")
    assert (weights.decoders, weights.out_width) == (("direct",), 6)
    assert set(weights.shapes()) == set(weights.params)


def test_initial_values_follow_the_official_code():
    model = parse(
        ModelConfig, {"size": "S/16", "depth": 2, "decoder_width": 256, "decoder_heads": 8}
    )
    module = digpt.build(model, out_width=64)
    params = jax.jit(module.init)(jax.random.key(0), *digpt.dummy_inputs(model))["params"]
    flat = {k: np.asarray(v) for k, v in mapping.flatten(params).items()}
    assert not flat["encoder/cls_token"].any()
    assert abs(flat["next/token"].std() - 0.02) < 0.003
    bias = flat["encoder/patch_embed/bias"]
    assert 0.018 < bias.std() < 0.024 and np.abs(bias).max() <= 768**-0.5  # torch's default
    qkv = flat["encoder/blocks/attn/qkv/kernel"]
    bound = (6 / (384 + 3 * 384)) ** 0.5  # xavier over the fused projection
    assert 0.99 * bound < np.abs(qkv).max() <= bound
    assert not np.array_equal(qkv[0], qkv[1])
    for path, value in flat.items():
        if path.endswith("scale"):
            assert (value == 1).all(), path
        elif path.endswith("bias") and "patch_embed" not in path:
            assert not value.any(), path
