"""The mesh, and where parameters and batches lie on it. The only file that names mesh axes."""

import math

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dgpt_jax import param_rules
from dgpt_jax.config import Mesh
from dgpt_jax.schema import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))

# Paths of parameters and of optimizer moments end alike. Leaves under `blocks` have a leading layer
# axis. fsdp splits the input width of a matrix, tensor splits heads and MLP hidden units.
RULES = (
    (r"blocks/.*(qkv|kv)/kernel$", P(None, "fsdp", None, "tensor", None)),
    (r"blocks/.*q/kernel$", P(None, "fsdp", "tensor", None)),
    (r"blocks/.*(qkv|kv)/bias$", P(None, None, "tensor", None)),
    (r"blocks/.*q/bias$", P(None, "tensor", None)),
    (r"blocks/.*proj/kernel$", P(None, "tensor", None, "fsdp")),
    (r"blocks/.*fc1/kernel$", P(None, "fsdp", "tensor")),
    (r"blocks/.*fc1/bias$", P(None, "tensor")),
    (r"blocks/.*fc2/kernel$", P(None, "tensor", "fsdp")),
    (r"(patch_embed|enc2dec|pred)/kernel$", P(None, "fsdp")),
    (r".*", P()),
)


def make_mesh(config: Mesh, devices=None) -> jax.sharding.Mesh:
    """The mesh over all devices, with -1 resolved; UserError where sizes do not fit."""
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    named = f"config.mesh {dict(zip(AXES, sizes, strict=True))}"
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise UserError(f"{named}: sizes are positive, and one of them may be -1")
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // math.prod(s for s in sizes if s != -1)
    if math.prod(sizes) != len(devices):
        raise UserError(f"{named} does not multiply to the {len(devices)} devices there are")
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes), AXES, axis_types=types, devices=devices)


def shard_state(mesh: jax.sharding.Mesh, abstract):
    """A tree of NamedSharding for a tree of parameters, optimizer state or both."""

    def place(path, leaf):
        spec = param_rules.match(RULES, param_rules.path_of(path)) if leaf.ndim else P()
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                raise UserError(
                    f"{param_rules.path_of(path)} {leaf.shape} cannot be split over "
                    f"{axis}={mesh.shape[axis]}: choose another config.mesh"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, abstract)


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Examples over data and fsdp."""
    return NamedSharding(mesh, BATCH)


def microbatch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """A batch cut into (micro-batches, examples, ...)."""
    return NamedSharding(mesh, P(None, *BATCH))


def process_rows(mesh: jax.sharding.Mesh, batch_size: int) -> slice:
    """The rows of a global batch that this process's devices hold."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % shards:
        raise UserError(
            f"a batch of {batch_size} is not divisible by the {shards} devices of data × fsdp"
        )
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    rows = sorted({i[0].indices(batch_size)[:2] for i in indices})
    low, high = rows[0][0], rows[-1][1]
    if sum(stop - start for start, stop in rows) != high - low or low % (high - low):
        raise UserError("config.mesh leaves a process with rows that are not next to each other")
    return slice(low, high)


def global_batch(mesh: jax.sharding.Mesh, batch_size: int, local):
    """Global arrays of `batch_size` examples from this process's rows, a tree of NumPy arrays."""
    sharding = batch_sharding(mesh)

    def place(x):
        shape = (batch_size, *np.shape(x)[1:])
        return jax.make_array_from_process_local_data(sharding, x, shape)

    return jax.tree.map(place, local)
