"""Checks of array arguments of the Python API.

Values are checked only if this process has them: for traced arrays, and arrays that other processes
hold parts of, only shape and dtype are checked. Each check returns the array; lists become NumPy
arrays.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dgpt_jax.errors import UserError

POOLINGS = ("cls", "mean")
# Limit of normalized pixels: with ImageNet's statistics black and white are about -2.2 and 2.7.
MAX_NORMALIZED = 20.0

Array = np.ndarray | jax.Array


def check_raw_images(images: Any, size: int) -> Array:
    """RGB images (B, size, size, 3), uint8 or float from 0 to 255.

    Raises UserError that states the actual and the expected array.
    """
    expected = f"uint8 or float 0-255, RGB, of shape (B, {size}, {size}, 3)"
    x = _as_array("images", images, expected)
    _check_image_shape(x, size, expected)
    if x.dtype == np.uint8:
        return x
    if not _is_float(x):
        raise _error("images", x, expected, "wrong dtype")
    if (bounds := _bounds("images", x, expected)) is not None:
        low, high = bounds
        if low < 0 or high > 255:
            raise _error("images", x, expected, f"values {low:.3g} to {high:.3g}")
        if 0 < high <= 1:
            reason = f"values {low:.3g} to {high:.3g}: multiply by 255"
            raise _error("images", x, expected, reason)
    return x


def check_normalized_images(images: Any, size: int) -> Array:
    """Normalized images (image / 255 - mean) / std, float (B, size, size, 3).

    Raises UserError that states the actual and the expected array.
    """
    expected = f"normalized float, (image / 255 - mean) / std, of shape (B, {size}, {size}, 3)"
    x = _as_array("images", images, expected)
    _check_image_shape(x, size, expected)
    if not _is_float(x):
        raise _error("images", x, expected, "wrong dtype")
    bounds = _bounds("images", x, expected)
    if bounds is not None and max(-bounds[0], bounds[1]) > MAX_NORMALIZED:
        raise _error("images", x, expected, f"values {bounds[0]:.3g} to {bounds[1]:.3g}")
    return x


def check_tokens(tokens: Any, width: int, *, cls: bool) -> Array:
    """Decoded teacher tokens: float (B, cls + N, width), N of a square grid. Raises UserError."""
    count = "1 + side²" if cls else "side²"
    expected = f"float, of shape (B, {count}, {width}){', CLS first' if cls else ''}"
    x = _as_array("tokens", tokens, expected)
    if not _is_float(x):
        raise _error("tokens", x, expected, "wrong dtype")
    if x.ndim != 3 or not len(x) or x.shape[2] != width:
        raise _error("tokens", x, expected, "wrong shape")
    patches = x.shape[1] - cls
    if patches < 1 or round(patches**0.5) ** 2 != patches:
        reason = f"{patches} patches are not a square grid (cls={cls})"
        raise _error("tokens", x, expected, reason)
    _bounds("tokens", x, expected)
    return x


def check_orders(orders: Any, count: int) -> Array:
    """Segment orders: int (B, count), each row a permutation. Raises UserError."""
    expected = f"int, of shape (B, {count}), each row a permutation of 0 to {count - 1}"
    x = _as_array("orders", orders, expected)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise _error("orders", x, expected, "wrong dtype")
    if x.ndim != 2 or not len(x) or x.shape[1] != count:
        raise _error("orders", x, expected, "wrong shape")
    if _has_values(x):
        values = np.asarray(x)
        invalid = (np.sort(values, axis=1) != np.arange(count)).any(axis=1)
        if invalid.any():
            row = int(invalid.argmax())
            example = f"row {row} is {values[row].tolist()}"
            reason = f"{invalid.sum()} rows are not permutations, {example}"
            raise _error("orders", x, expected, reason)
    return x


def check_poolings(poolings: Sequence[str]) -> tuple[str, ...]:
    """Pooling names, at least one. Raises UserError."""
    names = (poolings,) if isinstance(poolings, str) else tuple(poolings)
    if not names or any(name not in POOLINGS for name in names):
        raise UserError(f"pooling must be one of {', '.join(POOLINGS)}, got {poolings!r}")
    return names


def _as_array(name: str, x: Any, expected: str) -> Array:
    if isinstance(x, (np.ndarray, jax.Array)):
        return x
    try:
        return np.asarray(x)
    except (ValueError, TypeError) as e:  # ragged rows, GPU tensors
        raise UserError(f"{name} cannot be an array ({e}): expected {expected}") from None


def _check_image_shape(x: Array, size: int, expected: str) -> None:
    if x.ndim == 4 and len(x) and x.shape[1:] == (size, size, 3):
        return
    reason = "wrong shape"
    if x.ndim == 3:
        reason = "no batch axis: pass x[None]"
    elif x.ndim == 4 and not len(x):
        reason = "empty batch"
    elif x.ndim == 4 and x.shape[1] == 3 and x.shape[3] != 3:
        reason = "channels first: pass x.transpose(0, 2, 3, 1)"
    elif x.ndim == 4 and x.shape[3] == 3:
        reason = f"the model takes {size} pixels: resize them"
    raise _error("images", x, expected, reason)


def _bounds(name: str, x: Array, expected: str) -> tuple[float, float] | None:
    """Smallest and largest value; None without values. Raises UserError unless all are finite."""
    if not _has_values(x):
        return None
    values = np.asarray(x)
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        count = int((~np.isfinite(values)).reshape(len(values), -1).any(axis=1).sum())
        raise _error(name, x, expected, f"not finite in {count} of {len(values)}")
    return low, high


def _has_values(x: Array) -> bool:
    if isinstance(x, Tracer):
        return False
    return not isinstance(x, jax.Array) or x.is_fully_addressable


def _is_float(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _error(name: str, x: Array, expected: str, reason: str) -> UserError:
    return UserError(f"{name} are {x.dtype} {tuple(x.shape)}, {reason}; expected {expected}")
