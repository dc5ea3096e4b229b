"""Forward passes over batches of any size, in chunks of few shapes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dgpt_jax.errors import UserError
from dgpt_jax.weights.input_checks import Array

# Images per forward pass. At 224 pixels they take 0.4 GB (B/16) to 0.9 GB (H/14) beside the weights
# for features, 0.9 to 2.9 GB for pretraining losses.
CHUNK = 64


def in_chunks(run: Callable[..., Any], params: Any, *arrays: Array) -> Any:
    """Returns run(params, *arrays), computed on at most CHUNK rows at a time.

    Row i of the results, a tree of jax.Array (B, …), must depend only on row i of the arrays
    (B, …). Batches are padded to a power of two, so seven programs serve all batch sizes. Traced
    arguments and sharded arrays are processed in one call. Raises UserError if the arrays are empty
    or differ in length.
    """
    if any(map(_is_traced, jax.tree.leaves((params, arrays)))) or any(map(_is_sharded, arrays)):
        return run(params, *arrays)
    host_arrays = [np.asarray(x) for x in arrays]
    lengths = [len(x) for x in host_arrays]
    count = lengths[0]
    if not count or set(lengths) != {count}:
        raise UserError(f"batch of {lengths} rows: pass arrays of equal length, at least one row")
    size = min(CHUNK, 1 << (count - 1).bit_length())
    with jax.ensure_compile_time_eval():  # arrays may be constants in a caller's jit
        if count == size:
            return run(params, *host_arrays)
        rows = None
        for start in range(0, count, size):
            chunk = run(params, *(_pad(x[start : start + size], size) for x in host_arrays))
            if rows is None:
                rows = jax.tree.map(lambda x: np.empty((count, *x.shape[1:]), x.dtype), chunk)
            for buffer, result in zip(*map(jax.tree.leaves, (rows, chunk)), strict=True):
                buffer[start : start + size] = np.asarray(result)[: count - start]
        return jax.tree.map(jnp.asarray, rows)


def on_device(params: Any) -> Any:
    """Moves params to the default device, unless they are traced."""
    if any(map(_is_traced, jax.tree.leaves(params))):
        return params
    with jax.ensure_compile_time_eval():
        return jax.device_put(params)


def _pad(rows: np.ndarray, size: int) -> np.ndarray:
    """Pads to `size` rows with copies of the last."""
    return np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)])


def _is_traced(x) -> bool:
    return isinstance(x, Tracer)


def _is_sharded(x) -> bool:
    return isinstance(x, jax.Array) and len(x.sharding.device_set) > 1
