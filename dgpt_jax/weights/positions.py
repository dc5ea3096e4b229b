"""Tables of positions for another grid, as the layouts' own code computes them."""

from collections.abc import Callable
from functools import partial

import jax
import numpy as np

# (positions (cls+N, D), (rows, columns), cls) to (cls+rows·columns, D); CLS is unchanged.
Resize = Callable[[np.ndarray, tuple[int, int], bool], np.ndarray]


def _resize(
    positions: np.ndarray, grid: tuple[int, int], cls: bool, *, kernel: str, antialias: bool
) -> np.ndarray:
    side = round((len(positions) - cls) ** 0.5)
    width = positions.shape[1]
    table = positions[int(cls) :].reshape(side, side, width)
    table = jax.image.resize(table, (*grid, width), kernel, antialias=antialias)
    return np.concatenate([positions[: int(cls)], np.asarray(table).reshape(-1, width)])


# torch's `interpolate` with align_corners=False. With antialiasing it has another bicubic kernel.
bicubic: Resize = partial(_resize, kernel="cubic-pytorch", antialias=False)
bicubic_antialiased: Resize = partial(_resize, kernel="cubic", antialias=True)
bilinear: Resize = partial(_resize, kernel="linear", antialias=False)
bilinear_antialiased: Resize = partial(_resize, kernel="linear", antialias=True)


def sincos(positions: np.ndarray, grid: tuple[int, int], cls: bool) -> np.ndarray:
    """Fixed positions of AIMv2's models of native resolution, of the width of `positions`, which
    are not read: sines and cosines of the column, then of the row, with temperature 10,000."""
    width = positions.shape[1]
    frequencies = 10_000.0 ** -(np.arange(width // 4) / (width // 4))
    row, column = (axis.reshape(-1, 1) * frequencies for axis in np.indices(grid))
    parts = [np.sin(column), np.cos(column), np.sin(row), np.cos(row)]
    return np.concatenate(parts, axis=1).astype(np.float32)
