"""Checksums of arrays, equal on devices and host and under any sharding.

Each element's bits are mixed with its position, and the results are summed modulo 2^32, so the
order of summation does not matter. The mixing is a bijection of 32 bits, so a change of a single
element is always detected. Two sums, of different mixes, make 64 bits.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

CHUNK = 1 << 15  # elements that the host mixes at a time, to stay in its caches
SPREAD = 0x9E3779B9  # spreads positions over 32 bits: 2^32 / the golden ratio
FIRST, SECOND = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)  # MurmurHash3's odd multipliers
UNSIGNED = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint32"}  # by item size


def of_tree(tree: Any) -> dict[str, str]:
    """Returns {array name, by `name_of`: 16 hex digits} of a tree of jax.Array or NumPy arrays.

    Arrays on accelerators are summed there. If arrays are sharded over processes, all of them must
    call this together.
    """
    named = {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    sums = {name: _sums(leaf) for name, leaf in named.items()}
    sums = jax.device_get(sums)  # once all are dispatched
    return {name: "".join(f"{int(s):08x}" for s in pair) for name, pair in sums.items()}


def _sums(x: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """Both sums of an array, computed on its devices."""
    if not isinstance(x, jax.Array):
        return _on_host(x)
    devices = x.sharding.device_set
    on_cpus = next(iter(devices)).platform == "cpu"
    if on_cpus and len(devices) == 1:
        return _on_host(x)  # no copy, and no compilation
    sums = _on_devices(x)
    # On CPUs programs run concurrently, and reductions would wait for each other's threads.
    return jax.block_until_ready(sums) if on_cpus else sums


def name_of(path: Sequence[Any]) -> str:
    """Returns the name of a key path of a JAX tree: "params/encoder/blocks/attention/kernel"."""
    attributes = ("key", "idx", "name")
    return "/".join(str(next(getattr(k, a) for a in attributes if hasattr(k, a))) for k in path)


def of_json(content: Any) -> str:
    """Returns 16 hex digits of the SHA-256 of a value as JSON."""
    text = json.dumps(json.loads(json.dumps(content)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@jax.jit
def _on_devices(x: jax.Array) -> jax.Array:
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
    position, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        step = np.uint32(stride * SPREAD % 2**32)
        position += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * step
        stride *= bits.shape[axis]
    mixed = (bits ^ position) * FIRST
    mixed = (mixed ^ (mixed >> 15)) * SECOND
    sums = mixed.sum(dtype=jnp.uint32), (mixed ^ (mixed >> 13)).sum(dtype=jnp.uint32)
    return jnp.stack(sums)


def _on_host(x: jax.Array | np.ndarray) -> np.ndarray:
    """NumPy version of `_on_devices`, in buffers that fit into the CPU's caches."""
    array = np.ascontiguousarray(x)
    bits = array.reshape(-1).view(UNSIGNED[array.dtype.itemsize])
    positions = np.arange(CHUNK, dtype=np.uint32) * np.uint32(SPREAD)
    buffers, sums = np.empty((2, CHUNK), np.uint32), [0, 0]
    for start in range(0, len(bits), CHUNK):
        chunk = bits[start : start + CHUNK]
        mixed, shifted = buffers[:, : len(chunk)]
        np.add(positions[: len(chunk)], np.uint32(start * SPREAD % 2**32), out=mixed)
        mixed ^= chunk
        mixed *= FIRST
        mixed ^= np.right_shift(mixed, 15, out=shifted)
        mixed *= SECOND
        sums[0] += int(np.add.reduce(mixed, dtype=np.uint32))
        mixed ^= np.right_shift(mixed, 13, out=shifted)
        sums[1] += int(np.add.reduce(mixed, dtype=np.uint32))
    return np.array([total % 2**32 for total in sums], np.uint32)
