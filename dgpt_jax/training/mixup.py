"""What supervised training does to a batch on the device: erasing, mixup, cutmix, soft labels.

A function of (key, batch) alone: the same on any layout of devices. Sources: timm's
`random_erasing.py` (mode pixel) and `mixup.py` (mode batch).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special


def erase(key, images, boxes):
    """Normalised images (B, H, W, 3) with normal noise in boxes, int (B, 4): top, left, height,
    width."""
    noise = jax.random.normal(key, images.shape, images.dtype)
    top, left, height, width = boxes.T
    inside = in_boxes(top, top + height, left, left + width, images.shape[1:3])
    return jnp.where(inside[..., None], noise, images)


def in_boxes(top, bottom, left, right, shape):
    """bool (B, *shape): rows top…bottom - 1 and columns left…right - 1, each int (B,)."""
    rows, cols = jnp.arange(shape[0]), jnp.arange(shape[1])
    rows = (rows >= top[:, None]) & (rows < bottom[:, None])
    cols = (cols >= left[:, None]) & (cols < right[:, None])
    return rows[:, :, None] & cols[:, None, :]


class Mix(NamedTuple):
    """Of each of G groups: how much of its own label an example keeps, whether its picture is cut
    rather than blended, and the box that is cut: top, bottom, left, right. Each (G,)."""

    own: jax.Array
    cut: jax.Array
    box: tuple[jax.Array, ...]


def draw(key, groups: int, size: int, *, mixup: float, cutmix: float) -> Mix:
    """Draws for size×size pictures. mixup, cutmix: parameters of the Beta distributions, 0: not;
    with both, one of them is drawn, evenly."""
    coin, shares, centre = jax.random.split(key, 3)
    chosen = jnp.full((groups,), bool(cutmix))
    if mixup and cutmix:
        chosen = jax.random.bernoulli(coin, 0.5, (groups,))
    uniform = jax.random.uniform(shares, (groups,))
    own = jnp.where(chosen, _beta(uniform, cutmix or 1.0), _beta(uniform, mixup or 1.0))
    return cut_boxes(own, chosen, jax.random.randint(centre, (2, groups), 0, size), size)


def _beta(uniform, alpha: float):
    """Beta(alpha, alpha) by a table of its quantiles: jax.random.beta draws until it accepts, a
    loop without a bound, and takes seconds to compile."""
    grid = np.linspace(0, 1, 4097)
    return jnp.interp(uniform, grid, special.betaincinv(alpha, alpha, grid))


def cut_boxes(own, cut, centre, size: int) -> Mix:
    """The Mix of boxes of the share 1 - own around `centre` (2, G), cut off at the border: what
    they keep of the picture is what is kept of the label."""
    side = (size * jnp.sqrt(1 - own)).astype(jnp.int32)
    before, after = centre - side // 2, centre + (side + 1) // 2
    (top, left), (bottom, right) = jnp.clip(before, 0, size), jnp.clip(after, 0, size)
    kept = 1 - (bottom - top) * (right - left) / size**2
    return Mix(jnp.where(cut, kept, own), cut, (top, bottom, left, right))


def apply(mix: Mix, images, targets):
    """Images (B, H, W, 3) and soft labels (B, classes), mixed with those of the partners.

    The rows are cut into as many equal groups as `mix` has; partners are the first and the last of
    a group, and so on inwards.
    """
    groups = len(mix.own)

    def blend(x, share):
        grouped = x.reshape(groups, -1, *x.shape[1:])
        return (share * grouped + (1 - share) * grouped[:, ::-1]).reshape(x.shape)

    outside = ~in_boxes(*mix.box, images.shape[1:3])
    pixels = jnp.where(mix.cut[:, None, None], outside, mix.own[:, None, None])
    return blend(images, pixels[:, None, ..., None]), blend(targets, mix.own[:, None, None])


def soft_labels(labels, classes: int, smoothing: float):
    """int (B,) to (B, classes): the share `smoothing` is spread evenly over all classes."""
    return (1 - smoothing) * jax.nn.one_hot(labels, classes) + smoothing / classes
