"""Maps of features, attention and predictions over an image's patches, for figures, as NumPy.

G: side of the patch grid, N = G²; other letters as in models/digpt.py.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgpt_jax.config import ModelConfig
from dgpt_jax.data import segments
from dgpt_jax.models import classifier, digpt, transformer, vit
from dgpt_jax.weights import api, input_checks
from dgpt_jax.weights.types import Preprocess

# Rows of a similarity matrix computed at a time.
QUERIES = 256


def pca_colors(tokens: np.ndarray) -> np.ndarray:
    """Colors (B, N, 3) of patch tokens (B, N, D): their first three principal components over all
    images, each scaled from its 2nd to its 98th percentile."""
    return _colors(tokens.reshape(-1, tokens.shape[-1])).reshape(*tokens.shape[:2], 3)


def _colors(flat: np.ndarray) -> np.ndarray:
    """Colors (M, 3) of vectors (M, D)."""
    components = _components(flat, 3)
    low, high = np.percentile(components, [2, 98], axis=0)
    return np.clip((components - low) / np.maximum(high - low, 1e-9), 0, 1)


def _components(flat: np.ndarray, count: int) -> np.ndarray:
    """First principal components (M, count) float64 of (M, D), zero-padded if there are fewer.

    Uses eigenvectors of the D×D covariance: for 40 images of 256 tokens and 1024 channels an SVD of
    (M, D) is nine times as slow.
    """
    flat = flat - flat.mean(axis=0, dtype=np.float64)
    _, basis = np.linalg.eigh(flat.T @ flat)  # eigenvalues ascend
    components = flat @ basis[:, : -count - 1 : -1]
    return np.pad(components, ((0, 0), (0, count - components.shape[1])))


def foreground(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Foreground mask (B, N) of patch tokens (B, N, D) and its colors (B, N, 3), white elsewhere.

    The mask is where the first principal component of all tokens exceeds its mean. Its sign, which
    PCA leaves open, makes border patches background (DINOv2's figures choose it by eye). Colors are
    a second PCA, of the foreground alone.
    """
    batch, count, width = tokens.shape
    side = round(count**0.5)
    flat = tokens.reshape(-1, width)
    first = _components(flat, 1).reshape(batch, side, side)
    inner = np.zeros((side, side), bool)
    inner[1:-1, 1:-1] = True
    if inner.any() and first[:, inner].mean() < first[:, ~inner].mean():
        first = -first
    mask = first.reshape(batch, count) > 0
    colors = np.ones((batch, count, 3))
    if mask.any():
        colors[mask] = _colors(flat[mask.reshape(-1)])
    return mask, colors


def cls_attention(encoder: api.PretrainedEncoder, images: np.ndarray | jax.Array) -> np.ndarray:
    """Attention of CLS in the last block, (B, H, 1+N), CLS itself first; rows sum to 1.

    softmax(q kᵀ / √K) of the block's weights and input. images: uint8 (B, size, size, 3). Raises
    UserError on other images.
    """
    images = input_checks.check_raw_images(images, encoder.model.image_size)
    run = partial(_cls_attention, model=encoder.model, preprocess=encoder.preprocess)
    return np.asarray(api.in_chunks(run, encoder.device_params, images))


def last_attention(
    encoder: api.PretrainedEncoder, images: np.ndarray | jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Attention (B, H, 1+N, 1+N), values (B, 1+N, H, K), input and output (B, 1+N, D) of the last
    block. Raises UserError on other images than uint8 (B, size, size, 3)."""
    images = input_checks.check_raw_images(images, encoder.model.image_size)
    run = partial(_last_attention, model=encoder.model, preprocess=encoder.preprocess)
    return api.in_chunks(run, encoder.device_params, images)


@partial(jax.jit, static_argnames=("model", "preprocess"), inline=True)
def _last_attention(params, images, *, model: ModelConfig, preprocess):
    normalized = vit.normalize(images, preprocess.mean, preprocess.std)
    embedded = classifier.classifier(model, "cls").apply(
        {"params": params}, normalized, method="embed_tokens"
    )
    last, inputs = vit.encoder(model).apply(
        {"params": params["encoder"]}, embedded, method="forward_blocks"
    )
    x_BND = inputs[-1]  # pyright: ignore[reportArgumentType] # apply's type is too wide
    block = jax.tree.map(lambda leaf: leaf[-1], params["encoder"]["blocks"])
    normed = transformer.LayerNorm(model.eps).apply({"params": block["norm1"]}, x_BND)
    qkv = block["attn"]["qkv"]
    projected = jnp.einsum("bnd,pde->pbne", normed, qkv["kernel"]) + qkv["bias"][:, None, None]
    q, k, v = projected.reshape(*projected.shape[:-1], model.heads, -1)
    scores = jnp.einsum("bnhk,bmhk->bhnm", q, k) / q.shape[-1] ** 0.5
    return jax.nn.softmax(scores, axis=-1), v, x_BND, last


@partial(jax.jit, static_argnames=("model", "preprocess"))
def _cls_attention(params, images, *, model: ModelConfig, preprocess):
    attention, *_ = _last_attention(params, images, model=model, preprocess=preprocess)
    return attention[:, :, 0]


def unit(x: np.ndarray) -> np.ndarray:
    """Vectors along the last axis, scaled to length 1."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def neighbors(
    features: np.ndarray, count: int, queries: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Indices (Q, count) of the nearest other rows of features (B, D), and their cosines.

    queries: the Q rows whose neighbors are returned, default all.
    """
    vectors = unit(features)
    rows = np.arange(len(vectors)) if queries is None else np.asarray(queries)
    nearest = np.empty((len(rows), min(count, len(vectors) - 1)), int)
    cosines = np.empty(nearest.shape, vectors.dtype)
    for start in range(0, len(rows), QUERIES):
        block = slice(start, start + QUERIES)
        similarity = vectors[rows[block]] @ vectors.T
        similarity[np.arange(len(similarity)), rows[block]] = -np.inf
        nearest[block] = np.argsort(-similarity, axis=1, kind="stable")[:, : nearest.shape[1]]
        cosines[block] = np.take_along_axis(similarity, nearest[block], axis=1)
    return nearest, cosines


def prediction_maps(
    model: api.PretrainedDiGPT,
    images: np.ndarray | jax.Array,
    tokens: np.ndarray | jax.Array,
    orders: np.ndarray | jax.Array,
    cls: bool,
) -> dict[str, dict[str, np.ndarray]]:
    """Predictions of the pretraining model and the teacher's tokens: {decoder: {"similarity":
    cosines (B, G, G), "prediction" and "teacher": (B, G, G, C)}}, NaN where a decoder predicts
    nothing (`next`: the first segment of the order, `visible`: the last).

    images: uint8 (B, size, size, 3); tokens: decoded, (B, [1+]N, C); orders: int (B, S). G is the
    grid on which the loss compares them. Raises UserError on inputs of other shapes or dtypes.
    """
    images = input_checks.check_raw_images(images, model.model.image_size)
    tokens = input_checks.check_tokens(tokens, model.module.out_width, cls=cls)
    orders = input_checks.check_orders(orders, segments.count(model.model.segments))
    run = partial(
        _aligned, module=model.module, model=model.model, preprocess=model.preprocess, cls=cls
    )
    pairs = api.in_chunks(run, model.device_params, images, tokens, orders)
    return in_image_order(pairs, np.asarray(orders), model.model.segments)


def aligned(
    module: digpt.DiGPT,
    model: ModelConfig,
    params: Any,
    images: np.ndarray | jax.Array,
    tokens: np.ndarray | jax.Array,
    orders: np.ndarray | jax.Array,
    *,
    cls: bool,
    teacher: str = "",
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """digpt.align of a module's predictions for normalized images (B, size, size, 3), with tokens
    and orders as of `prediction_maps`; jittable. model: the module's config. teacher: whose tokens
    they are, of the module's teachers."""
    orders = jnp.asarray(orders)
    by_name: Any = module.apply({"params": params}, jnp.asarray(images), orders)
    names = {name: digpt.join(name, teacher) for name in digpt.DECODERS}
    predicted = {name: by_name[key] for name, key in names.items() if key in by_name}
    return digpt.align(
        predicted, jnp.asarray(tokens), orders, grid=(model.grid, model.grid),
        segment_grid=model.segments, cls=cls,
    )  # fmt: skip


@partial(jax.jit, static_argnames=("module", "model", "preprocess", "cls"))
def _aligned(
    params,
    images,
    tokens,
    orders,
    *,
    module: digpt.DiGPT,
    model: ModelConfig,
    preprocess: Preprocess,
    cls: bool,
):
    images = vit.normalize(jnp.asarray(images), preprocess.mean, preprocess.std)
    return aligned(module, model, params, images, tokens, orders, cls=cls)


def in_image_order(
    pairs: dict, orders: np.ndarray, shape: tuple[int, int]
) -> dict[str, dict[str, np.ndarray]]:
    """Maps, as of `prediction_maps`, of the pairs of `aligned`; shape: grid of segments."""
    maps = {}
    for name, pair in pairs.items():
        prediction, teacher = (_scatter_segments(np.asarray(x), orders, shape, name) for x in pair)
        norms = np.linalg.norm(prediction, axis=-1) * np.linalg.norm(teacher, axis=-1)
        similarity = (prediction * teacher).sum(axis=-1) / np.maximum(norms, 1e-12)
        maps[name] = {"similarity": similarity, "prediction": prediction, "teacher": teacher}
    return maps


def _scatter_segments(x_BVTC: np.ndarray, orders: np.ndarray, shape: tuple[int, int], name: str):
    """Segments in their order (B, V, T, C) at their positions in the image, (B, G, G, C)."""
    batch, visible, patches, width = x_BVTC.shape
    ranks = segments.predicted_ranks(name, visible)
    x_BSTC = np.full((batch, segments.count(shape), patches, width), np.nan, np.float32)
    x_BSTC[np.arange(batch)[:, None], orders[:, ranks]] = x_BVTC
    side = round((x_BSTC.shape[1] * patches) ** 0.5)
    height, columns = side // shape[0], side // shape[1]
    x = x_BSTC.reshape(batch, *shape, height, columns, width).swapaxes(2, 3)
    return x.reshape(batch, side, side, width)
