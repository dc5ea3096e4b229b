"""Batch augmentations on the device: random erasing, mixup, cutmix, soft labels.

Functions of (key, batch), with the same result on any mesh. Sources: timm's `random_erasing.py`
(mode pixel) and `mixup.py` (mode batch).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special


def erase(key: jax.Array, images: jax.Array, boxes: jax.Array) -> jax.Array:
    """Normalized images (B, H, W, 3) with Gaussian noise in boxes, int (B, 4): top, left, height,
    width."""
    noise = jax.random.normal(key, images.shape, images.dtype)
    top, left, height, width = boxes.T
    inside = in_boxes(top, top + height, left, left + width, images.shape[1:3])
    return jnp.where(inside[..., None], noise, images)


def in_boxes(
    top: jax.Array, bottom: jax.Array, left: jax.Array, right: jax.Array, shape: Sequence[int]
) -> jax.Array:
    """bool (B, *shape): rows top…bottom - 1 and columns left…right - 1, each int (B,)."""
    rows, cols = jnp.arange(shape[0]), jnp.arange(shape[1])
    rows = (rows >= top[:, None]) & (rows < bottom[:, None])
    cols = (cols >= left[:, None]) & (cols < right[:, None])
    return rows[:, :, None] & cols[:, None, :]


class MixParams(NamedTuple):
    """lam: weight of an example's own label; cut: True for cutmix, False for mixup; box: top,
    bottom, left, right of cutmix. Each (G,), one per group of examples."""

    lam: jax.Array
    cut: jax.Array
    box: tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def sample_mix(key: jax.Array, groups: int, size: int, *, mixup: float, cutmix: float) -> MixParams:
    """Samples parameters for size×size images. mixup, cutmix: alpha of the Beta distributions, 0
    disables; with both, each is used with probability 0.5."""
    coin_key, lam_key, center_key = jax.random.split(key, 3)
    cut = jnp.full((groups,), bool(cutmix))
    if mixup and cutmix:
        cut = jax.random.bernoulli(coin_key, 0.5, (groups,))
    uniform = jax.random.uniform(lam_key, (groups,))
    lam = jnp.where(cut, _beta(uniform, cutmix or 1.0), _beta(uniform, mixup or 1.0))
    return cut_boxes(lam, cut, jax.random.randint(center_key, (2, groups), 0, size), size)


def _beta(uniform: jax.Array, alpha: float) -> jax.Array:
    """Beta(alpha, alpha) from uniform samples and a table of quantiles: jax.random.beta is an
    unbounded rejection loop that takes seconds to compile."""
    grid = np.linspace(0, 1, 4097)
    return jnp.interp(uniform, grid, special.betaincinv(alpha, alpha, grid))


def cut_boxes(lam: jax.Array, cut: jax.Array, center: jax.Array, size: int) -> MixParams:
    """MixParams with boxes of relative area 1 - lam around `center` (2, G), clipped at the border;
    lam of cutmix is corrected for the clipping."""
    side = (size * jnp.sqrt(1 - lam)).astype(jnp.int32)
    low, high = center - side // 2, center + (side + 1) // 2
    (top, left), (bottom, right) = jnp.clip(low, 0, size), jnp.clip(high, 0, size)
    outside = 1 - (bottom - top) * (right - left) / size**2
    return MixParams(jnp.where(cut, outside, lam), cut, (top, bottom, left, right))


def apply(mix: MixParams, images: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Images (B, H, W, 3) and soft labels (B, classes), mixed with those of their partners.

    Rows are split into as many equal groups as `mix` has; the partner of a row is its mirror image
    within the group: first and last, second and second last, …
    """
    groups = len(mix.lam)

    def blend(x, weight):
        grouped = x.reshape(groups, -1, *x.shape[1:])
        return (weight * grouped + (1 - weight) * grouped[:, ::-1]).reshape(x.shape)

    outside = ~in_boxes(*mix.box, images.shape[1:3])
    pixels = jnp.where(mix.cut[:, None, None], outside, mix.lam[:, None, None])
    return blend(images, pixels[:, None, ..., None]), blend(targets, mix.lam[:, None, None])


def soft_labels(labels: jax.Array, classes: int, smoothing: float) -> jax.Array:
    """int (B,) to (B, classes), with label smoothing over all classes."""
    return (1 - smoothing) * jax.nn.one_hot(labels, classes) + smoothing / classes
