"""Rotary positions of teachers: RoPE (arXiv 2104.09864) on the two axes of a grid of patches.

Sources: DINOv3 (arXiv 2508.10104) is Hugging Face's DINOv3ViTModel; EVA-02 (2303.11331) and the
Perception Encoder (2504.13181) are timm's `Eva`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Rope:
    """Rotary positions of a tower: half of a head's pairs of channels turn by row, half by column.

    theta: pair k of an axis turns by coordinate · theta^(-4k / K) with heads of K channels.
    centered: coordinates are the patches' centers in [-1, 1], times 2π; otherwise their indices.
    reference: side of the grid to whose range indices are scaled; None: not scaled. offset: added
    to indices before that. columns_first: the first half of the pairs turns by the column.
    interleaved: a pair is two neighbors; otherwise channels k and K/2 + k.
    """

    theta: float
    centered: bool = False
    reference: int | None = None
    offset: float = 0.0
    columns_first: bool = False
    interleaved: bool = True


def angles(rope: Rope, grid: tuple[int, int], head_width: int) -> np.ndarray:
    """Returns the angles (rows·cols, K/2) in radians, float64, of patches row by row."""
    if head_width % 4:
        raise ValueError(f"rotary positions need heads of 4k channels, not {head_width}")
    axes = []
    for count in grid:
        index = np.arange(count, dtype=np.float64)
        if rope.centered:
            axes.append(2 * np.pi * (2 * (index + 0.5) / count - 1))
        else:
            scale = 1.0 if rope.reference is None else rope.reference / count
            axes.append((index + rope.offset) * scale)
    coordinates = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
    if rope.columns_first:
        coordinates = coordinates[:, ::-1]
    frequencies = rope.theta ** -(np.arange(head_width // 4) / (head_width // 4))
    return (coordinates[:, :, None] * frequencies).reshape(len(coordinates), -1)


def rotate(x_BND: jax.Array, rope: Rope, grid: tuple[int, int], head_width: int) -> jax.Array:
    """Rotates queries or keys (…, N, D), in float32, of heads side by side.

    The last rows·cols tokens are the patches; the tokens before them are not rotated.
    """
    turn = angles(rope, grid, head_width)
    before = x_BND.shape[-2] - len(turn)
    cos, sin = (jnp.asarray(f(turn)[:, None], jnp.float32) for f in (np.cos, np.sin))
    heads = x_BND[..., before:, :].astype(jnp.float32)
    heads = heads.reshape(*heads.shape[:-1], -1, head_width)
    if rope.interleaved:
        a, b = heads[..., ::2], heads[..., 1::2]
    else:
        a, b = jnp.split(heads, 2, axis=-1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    turned = jnp.stack(pair, axis=-1) if rope.interleaved else jnp.concatenate(pair, axis=-1)
    patches = turned.reshape(*heads.shape[:-2], x_BND.shape[-1]).astype(x_BND.dtype)
    return jnp.concatenate([x_BND[..., :before, :], patches], axis=-2)
