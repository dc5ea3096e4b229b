"""Geometry of segments: their patches, their order, the attention mask. NumPy only.

An image is a grid of `rows`×`cols` patches, cut into `segments` = (segment rows, segment columns)
equal rectangles. Segments are numbered in raster order, and so are the patches inside one. With S
segments, the first V = S-1 of an image's order are visible to the encoder (V = 1 where S = 1).
Source: D-iGPT, section 3 and `models_digpt.py` (`raster`, `mask_generate`, `forward_loss`).
"""

from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    import jax

ArrayT = TypeVar("ArrayT", np.ndarray, "jax.Array")


def count(segments: tuple[int, int]) -> int:
    """S, the number of segments."""
    return segments[0] * segments[1]


def visible_count(segments: tuple[int, int]) -> int:
    """V, the number of segments that the encoder sees."""
    return max(1, count(segments) - 1)


def predicted_ranks(name: str, visible: int) -> slice:
    """Returns the ranks, in the segment order, that the predictions `name` are of: 1..V for `next`,
    the encoder's 0..V-1 for the others (`visible`, `direct`)."""
    return slice(1, None) if name == "next" else slice(0, visible)


def split(grid: ArrayT, segments: tuple[int, int]) -> ArrayT:
    """Splits a grid (..., rows, cols, C) into segments (..., S, T, C); NumPy or JAX arrays."""
    *lead, rows, cols, channels = grid.shape
    height, width = rows // segments[0], cols // segments[1]
    if (height * segments[0], width * segments[1]) != (rows, cols):
        raise ValueError(f"{segments} segments do not divide a grid of {rows}×{cols}")
    blocks = grid.reshape(*lead, segments[0], height, segments[1], width, channels)
    n = len(lead)
    axes = (*range(n), n, n + 2, n + 1, n + 3, n + 4)
    return blocks.transpose(axes).reshape(*lead, count(segments), height * width, channels)


def sample_order(rng: np.random.Generator, segments: tuple[int, int]) -> np.ndarray:
    """Returns a uniformly random permutation of the segments, int32 (S,)."""
    return rng.permutation(count(segments)).astype(np.int32)


def raster_order(segments: tuple[int, int]) -> np.ndarray:
    """Returns the segments from top left to bottom right, int32 (S,)."""
    return np.arange(count(segments), dtype=np.int32)


def attention_mask(visible: int, tokens: int, cls_mask: str = "official") -> np.ndarray:
    """Attention mask of V·T patches and a CLS token, which is last: bool (V·T+1, V·T+1).

    Queries are rows, keys columns. A patch attends to its own and earlier segments, CLS to all.
    `cls_mask` selects the patches that attend to CLS: "official", the last visible segment (the
    result of the official code's mask, padded by reflection); "self", none; "all", every patch,
    which leaks later segments to earlier ones and is an ablation only.
    """
    rank = np.repeat(np.arange(visible), tokens)
    mask = np.ones((visible * tokens + 1,) * 2, bool)
    mask[:-1, :-1] = rank[:, None] >= rank[None, :]
    mask[:-1, -1] = {"official": rank == visible - 1, "self": False, "all": True}[cls_mask]
    return mask


def resize_matrix(source: tuple[int, int], target: tuple[int, int]) -> np.ndarray:
    """Returns bilinear interpolation of a grid of tokens as a matrix, float32 (target n, source n).

    Half-pixel centers, edges clamped, no antialiasing: `F.interpolate(mode="bilinear",
    align_corners=False)`, which the official loss applies to predictions.
    """

    def axis_weights(n_in: int, n_out: int) -> np.ndarray:
        center = np.clip((np.arange(n_out) + 0.5) * n_in / n_out - 0.5, 0, n_in - 1)
        low = np.minimum(np.floor(center).astype(int), max(n_in - 2, 0))
        weights = np.zeros((n_out, n_in))
        weights[np.arange(n_out), low] = 1 - (center - low)
        weights[np.arange(n_out), np.minimum(low + 1, n_in - 1)] += center - low
        return weights

    rows = axis_weights(source[0], target[0])
    cols = axis_weights(source[1], target[1])
    return np.kron(rows, cols).astype(np.float32)


def sincos_positions(width: int, rows: int, cols: int) -> np.ndarray:
    """Returns fixed 2-D sin-cos positions, float32 (rows, cols, width); width is a multiple of 4.

    The first half encodes the column, the second the row, each as sines then cosines, computed in
    float32 as `util/pos_embed.py` does.
    """
    omega = np.arange(width // 4, dtype=np.float32) / np.float32(width / 4)
    omega = (1.0 / 10000**omega).astype(np.float32)

    def encode(position):
        angle = position.astype(np.float32)[..., None] * omega
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)

    row, col = np.meshgrid(np.arange(rows), np.arange(cols), indexing="ij")
    return np.concatenate([encode(col), encode(row)], axis=-1).astype(np.float32)


def sincos_table(width: int, grid: int) -> np.ndarray:
    """Returns `sincos_positions` of CLS, which has zeros, and of grid² patches in raster order,
    float32 (1, 1+grid², width)."""
    table = sincos_positions(width, grid, grid).reshape(1, -1, width)
    return np.concatenate([np.zeros((1, 1, width), np.float32), table], axis=1)
