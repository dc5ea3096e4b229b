"""What a model makes of pictures, as maps over their patches: for eyes, not for scores. NumPy out.

G is the side of the grid of patches, N = G²; the rest is digpt.py's legend.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dgpt_jax import arguments, digpt, heads, load, segments, transformer, vit
from dgpt_jax.config import Model

# Rows of a matrix of similarities that are in memory at a time.
QUERIES = 256


def pca_colours(tokens: np.ndarray) -> np.ndarray:
    """Patch tokens (B, N, D) to colours (B, N, 3): three components of all of them together, each
    over its 2nd-98th percentile."""
    return _colours(tokens.reshape(-1, tokens.shape[-1])).reshape(*tokens.shape[:2], 3)


def _colours(flat: np.ndarray) -> np.ndarray:
    """(M, D) to (M, 3)."""
    components = _components(flat, 3)
    low, high = np.percentile(components, [2, 98], axis=0)
    return np.clip((components - low) / np.maximum(high - low, 1e-9), 0, 1)


def _components(flat: np.ndarray, count: int) -> np.ndarray:
    """(M, D) to its first principal components (M, count) float64, zeros where there are fewer.

    By the eigenvectors of the D×D covariance: for 40 images of 256 tokens and 1024 channels the SVD
    of (M, D) takes nine times as long.
    """
    flat = flat - flat.mean(axis=0, dtype=np.float64)
    _, basis = np.linalg.eigh(flat.T @ flat)  # eigenvalues ascend
    components = flat @ basis[:, : -count - 1 : -1]
    return np.pad(components, ((0, 0), (0, count - components.shape[1])))


def foreground(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Patch tokens (B, N, D) to (mask (B, N), colours (B, N, 3) of what it keeps, else white).

    The mask is the first principal component of all tokens together above its mean. A component has
    no sign: foreground is the side that the patches at the borders lie less on (DINOv2's figures
    choose it by eye). The colours are a second PCA, of the foreground alone.
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
    colours = np.ones((batch, count, 3))
    if mask.any():
        colours[mask] = _colours(flat[mask.reshape(-1)])
    return mask, colours


def cls_attention(encoder: load.Encoder, pictures: np.ndarray) -> np.ndarray:
    """What CLS attends to in the last block: (B, H, 1+N), CLS itself first, each row's sum is 1.

    softmax(q kᵀ / √K) of the block's own weights on its own input. pictures: uint8 (B, size, size,
    3).
    """
    pictures = arguments.check_pictures(pictures, encoder.model.image_size)
    run = partial(_cls_attention, model=encoder.model, preprocess=encoder.preprocess)
    return np.asarray(load.in_chunks(run, encoder.device_params, pictures))


def last_attention(encoder: load.Encoder, pictures):
    """Of the last block: attention (B, H, 1+N, 1+N), its values (B, 1+N, H, K), its input and its
    output (B, 1+N, D)."""
    pictures = arguments.check_pictures(pictures, encoder.model.image_size)
    run = partial(_last_attention, model=encoder.model, preprocess=encoder.preprocess)
    return load.in_chunks(run, encoder.device_params, pictures)


@partial(jax.jit, static_argnames=("model", "preprocess"), inline=True)
def _last_attention(params, pictures, *, model: Model, preprocess):
    images = vit.normalise(pictures, preprocess.mean, preprocess.std)
    entered = heads.classifier(model, "cls").apply({"params": params}, images, method="enter")
    last, inputs = vit.encoder(model).apply(
        {"params": params["encoder"]}, entered, method="transform"
    )
    x_BND = inputs[-1]
    block = jax.tree.map(lambda leaf: leaf[-1], params["encoder"]["blocks"])
    normed = transformer.LayerNorm(model.eps).apply({"params": block["norm1"]}, x_BND)
    qkv = block["attn"]["qkv"]
    projected = jnp.einsum("bnd,pde->pbne", normed, qkv["kernel"]) + qkv["bias"][:, None, None]
    q, k, v = projected.reshape(*projected.shape[:-1], model.heads, -1)
    scores = jnp.einsum("bnhk,bmhk->bhnm", q, k) / q.shape[-1] ** 0.5
    return jax.nn.softmax(scores, axis=-1), v, x_BND, last


@partial(jax.jit, static_argnames=("model", "preprocess"))
def _cls_attention(params, pictures, *, model: Model, preprocess):
    attention, *_ = _last_attention(params, pictures, model=model, preprocess=preprocess)
    return attention[:, :, 0]


def neighbours(
    features: np.ndarray, count: int, of: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Features (B, D) to (indices (Q, count) of the others that are nearest, their cosines).

    of: the Q rows whose neighbours are looked for; default: all.
    """
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    rows = np.arange(len(unit)) if of is None else np.asarray(of)
    nearest = np.empty((len(rows), min(count, len(unit) - 1)), int)
    cosines = np.empty(nearest.shape, unit.dtype)
    for start in range(0, len(rows), QUERIES):
        block = slice(start, start + QUERIES)
        similarity = unit[rows[block]] @ unit.T
        similarity[np.arange(len(similarity)), rows[block]] = -np.inf
        nearest[block] = np.argsort(-similarity, axis=1, kind="stable")[:, : nearest.shape[1]]
        cosines[block] = np.take_along_axis(similarity, nearest[block], axis=1)
    return nearest, cosines


def prediction_maps(
    model: load.Pretrained, pictures: np.ndarray, tokens: np.ndarray, orders: np.ndarray, cls: bool
) -> dict[str, dict[str, np.ndarray]]:
    """What the pretraining model predicts, against the teacher: {decoder: {"similarity": cosines
    (B, G, G), "prediction", "teacher": (B, G, G, C)}}, where the patches are; NaN where the decoder
    predicts nothing (`next` the first segment of the order, `visible` the last).

    pictures: uint8 (B, size, size, 3); tokens: decoded, (B, [1+]N, C); orders: int (B, S). G is
    the grid on which the loss compares them. `next` predicts a segment from those before it.
    """
    pictures = arguments.check_pictures(pictures, model.model.image_size)
    tokens = arguments.check_tokens(tokens, model.module.out_width, cls=cls)
    orders = arguments.check_orders(orders, segments.count(model.model.segments))
    run = partial(_aligned, module=model.module, model=model.model, cls=cls)
    pairs = load.in_chunks(run, model.device_params, pictures, tokens, orders)
    return in_place(pairs, orders, model.model.segments)


def aligned(module: digpt.DiGPT, model: Model, params, pictures, tokens, orders, *, cls: bool):
    """digpt.align of what a module predicts of pictures, as `prediction_maps` takes them; jittable.

    `model` is its config.
    """
    images, orders = vit.normalise(jnp.asarray(pictures)), jnp.asarray(orders)
    predicted = module.apply({"params": params}, images, orders)
    return digpt.align(
        predicted, jnp.asarray(tokens), orders, grid=(model.grid,) * 2,
        segment_grid=model.segments, cls=cls,
    )  # fmt: skip


@partial(jax.jit, static_argnames=("module", "model", "cls"))
def _aligned(params, pictures, tokens, orders, *, module: digpt.DiGPT, model: Model, cls: bool):
    return aligned(module, model, params, pictures, tokens, orders, cls=cls)


def in_place(pairs: dict, orders: np.ndarray, shape: tuple[int, int]) -> dict:
    """The maps of what `aligned` gives."""
    maps = {}
    for name, pair in pairs.items():
        prediction, teacher = (_placed(np.asarray(x), orders, shape, name) for x in pair)
        norms = np.linalg.norm(prediction, axis=-1) * np.linalg.norm(teacher, axis=-1)
        similarity = (prediction * teacher).sum(axis=-1) / np.maximum(norms, 1e-12)
        maps[name] = {"similarity": similarity, "prediction": prediction, "teacher": teacher}
    return maps


def _placed(x_BVTC: np.ndarray, orders: np.ndarray, shape: tuple[int, int], name: str):
    """Segments in their order, (B, V, T, C), to where they are in the image, (B, G, G, C)."""
    batch, visible, patches, width = x_BVTC.shape
    places = segments.predicted_places(name, visible)
    x_BSTC = np.full((batch, segments.count(shape), patches, width), np.nan, np.float32)
    x_BSTC[np.arange(batch)[:, None], orders[:, places]] = x_BVTC
    side = round((x_BSTC.shape[1] * patches) ** 0.5)
    high, wide = side // shape[0], side // shape[1]
    x = x_BSTC.reshape(batch, *shape, high, wide, width).swapaxes(2, 3)
    return x.reshape(batch, side, side, width)
