"""Checks of the arrays that users of the Python API give to a model.

Values are read only where this process has them: of a traced array, or of one that other processes
hold too, shape and dtype are checked. Each check returns the array; lists become NumPy arrays.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dgpt_jax.schema import UserError

POOLINGS = ("cls", "mean")
# Of normalised pixels: black and white are about -2.2 and 2.7 by ImageNet's statistics.
NORMALISED = 20.0


def check_pictures(pictures, size: int):
    """Pictures as stored: uint8, or float from 0 to 255, RGB (B, size, size, 3).

    Raises UserError that says what was given and what is taken.
    """
    taken = f"uint8 or float 0-255, RGB, of shape (B, {size}, {size}, 3)"
    x = _array("pictures", pictures, taken)
    _check_image_shape("pictures", x, size, taken)
    if x.dtype == np.uint8:
        return x
    if not _is_float(x):
        raise _wrong("pictures", x, taken, "of another dtype")
    if (bounds := _bounds("pictures", x, taken)) is not None:
        low, high = bounds
        if low < 0 or high > 255:
            raise _wrong("pictures", x, taken, f"from {low:.3g} to {high:.3g}")
        if 0 < high <= 1:
            raise _wrong("pictures", x, taken, f"from {low:.3g} to {high:.3g}: multiply by 255")
    return x


def check_images(images, size: int):
    """Normalised images, float (B, size, size, 3): (picture / 255 - mean) / std.

    Raises UserError that says what was given and what is taken.
    """
    taken = f"normalised float, (picture / 255 - mean) / std, of shape (B, {size}, {size}, 3)"
    x = _array("images", images, taken)
    _check_image_shape("images", x, size, taken)
    if not _is_float(x):
        raise _wrong("images", x, taken, "of another dtype")
    bounds = _bounds("images", x, taken)
    if bounds is not None and max(-bounds[0], bounds[1]) > NORMALISED:
        raise _wrong("images", x, taken, f"from {bounds[0]:.3g} to {bounds[1]:.3g}")
    return x


def check_tokens(tokens, width: int, *, cls: bool):
    """Decoded teacher tokens: float (B, cls + N, width), N of a square grid. Raises UserError."""
    count = "1 + side²" if cls else "side²"
    taken = f"float, of shape (B, {count}, {width}){', CLS first' if cls else ''}"
    x = _array("tokens", tokens, taken)
    if not _is_float(x):
        raise _wrong("tokens", x, taken, "of another dtype")
    if x.ndim != 3 or not len(x) or x.shape[2] != width:
        raise _wrong("tokens", x, taken, "of another shape")
    patches = x.shape[1] - cls
    if patches < 1 or round(patches**0.5) ** 2 != patches:
        raise _wrong("tokens", x, taken, f"{patches} patches, which are no square (cls={cls})")
    _bounds("tokens", x, taken)
    return x


def check_orders(orders, count: int):
    """Segment orders: int (B, count), each row a permutation. Raises UserError."""
    taken = f"int, of shape (B, {count}), each row a permutation of 0 to {count - 1}"
    x = _array("orders", orders, taken)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise _wrong("orders", x, taken, "of another dtype")
    if x.ndim != 2 or not len(x) or x.shape[1] != count:
        raise _wrong("orders", x, taken, "of another shape")
    if _has_values(x):
        bad = (np.sort(np.asarray(x), axis=1) != np.arange(count)).any(axis=1)
        if bad.any():
            row = int(bad.argmax())
            shown = np.asarray(x)[row].tolist()
            raise _wrong("orders", x, taken, f"{bad.sum()} are no permutations, row {row}: {shown}")
    return x


def check_poolings(poolings: Sequence[str]) -> tuple[str, ...]:
    """Names of poolings, at least one. Raises UserError."""
    names = (poolings,) if isinstance(poolings, str) else tuple(poolings)
    if not names or any(name not in POOLINGS for name in names):
        raise UserError(f"pooling must be one of {', '.join(POOLINGS)}, got {poolings!r}")
    return names


def _array(name: str, x, taken: str):
    if isinstance(x, (np.ndarray, jax.Array)):
        return x
    try:
        return np.asarray(x)
    except (ValueError, TypeError) as e:  # rows of different lengths, tensors of a GPU
        raise UserError(f"{name} are no array ({e}): give {taken}") from None


def _check_image_shape(name: str, x, size: int, taken: str):
    if x.ndim == 4 and len(x) and x.shape[1:] == (size, size, 3):
        return
    reason = "of another shape"
    if x.ndim == 3:
        reason = "without a batch axis: give x[None]"
    elif x.ndim == 4 and not len(x):
        reason = "an empty batch"
    elif x.ndim == 4 and x.shape[1] == 3 and x.shape[3] != 3:
        reason = "channels first: give x.transpose(0, 2, 3, 1)"
    elif x.ndim == 4 and x.shape[3] == 3:
        reason = f"not the model's {size} pixels: resize them"
    raise _wrong(name, x, taken, reason)


def _bounds(name: str, x, taken: str) -> tuple[float, float] | None:
    """The smallest and the largest value, None where they are not there. Raises UserError unless
    all are finite."""
    if not _has_values(x):
        return None
    values = np.asarray(x)
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        bad = int((~np.isfinite(values)).reshape(len(values), -1).any(axis=1).sum())
        raise _wrong(name, x, taken, f"not finite in {bad} of {len(values)}")
    return low, high


def _has_values(x) -> bool:
    if isinstance(x, jax.core.Tracer):
        return False
    return not isinstance(x, jax.Array) or x.is_fully_addressable


def _is_float(x) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _wrong(name: str, x, taken: str, reason: str) -> UserError:
    return UserError(f"{name} are {x.dtype} {tuple(x.shape)}, {reason}; taken are {taken}")
