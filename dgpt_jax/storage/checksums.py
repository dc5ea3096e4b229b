"""Checksums of arrays, the same on devices as on the host, however an array is split over devices.

Each element's bits are mixed with its position, and the mixed numbers are summed (modulo 2^32):
sums come out the same in any order. The mixing maps 32 bits one to one, so that a change of a
single element is always seen; two sums of different mixes are 64 bits.
"""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

CHUNK = 1 << 15  # elements that the host mixes at a time, in its caches
SPREAD = 0x9E3779B9  # of positions over all 32 bits: 2^32 / the golden ratio
FIRST, SECOND = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)  # odd multipliers, MurmurHash3's
UNSIGNED = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint32"}  # by bytes of an element


def of_tree(tree) -> dict[str, str]:
    """{name of an array, by `name_of`: 16 hex digits} of a tree of jax.Array or NumPy arrays.

    Arrays on accelerators are summed there. All processes must call this together where arrays are
    split over several of them.
    """
    named = {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    sums = {name: _sums(leaf) for name, leaf in named.items()}
    sums = jax.device_get(sums)  # after the last one is under way
    return {name: "".join(f"{int(part):08x}" for part in parts) for name, parts in sums.items()}


def _sums(x):
    """The two sums of an array, where it is."""
    if not isinstance(x, jax.Array):
        return _on_host(x)
    devices = x.sharding.device_set
    on_cpus = next(iter(devices)).platform == "cpu"
    if on_cpus and len(devices) == 1:
        return _on_host(x)  # read in place, and nothing is compiled
    sums = _on_devices(x)
    # On CPUs programs run side by side, and their reductions wait for each other's threads.
    return jax.block_until_ready(sums) if on_cpus else sums


def name_of(path) -> str:
    """The names along a path of JAX's trees: "params/encoder/blocks/attention/kernel"."""
    attributes = ("key", "idx", "name")
    return "/".join(str(next(getattr(k, a) for a in attributes if hasattr(k, a))) for k in path)


def of_json(content: Any) -> str:
    """16 hex digits of SHA-256 of what can be written as JSON."""
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


def _on_host(x) -> np.ndarray:
    """As `_on_devices`, in buffers that stay in the processor's caches."""
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
    return np.uint32([total % 2**32 for total in sums])
