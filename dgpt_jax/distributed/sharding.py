"""The mesh, and the shardings of parameters and batches. The only file that names mesh axes."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dgpt_jax.config import MeshConfig
from dgpt_jax.distributed import param_rules
from dgpt_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))

# Paths of optimizer moments end in those of their parameters. Leaves under `blocks` have a leading
# layer axis. fsdp splits the input width of a matrix, tensor splits heads and MLP hidden units.
RULES = (
    (r"blocks/.*(qkv|q|kv)/kernel$", P(None, None, "fsdp", "tensor")),
    (r"blocks/.*(qkv|q|kv)/bias$", P(None, None, "tensor")),
    (r"blocks/.*proj/kernel$", P(None, "tensor", "fsdp")),
    (r"blocks/.*fc1/kernel$", P(None, "fsdp", "tensor")),
    (r"blocks/.*fc1/bias$", P(None, "tensor")),
    (r"blocks/.*fc2/kernel$", P(None, "tensor", "fsdp")),
    (r"(patch_embed|enc2dec|pred)/kernel$", P(None, "fsdp")),
    (r".*", P()),
)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """Returns the mesh over `devices` (None: all), with -1 resolved.

    Only the data axis crosses TPU slices, which are joined by a slower network: fsdp and tensor,
    which communicate more, stay within a slice. Raises UserError if sizes do not match the devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    setting = f"config.mesh {dict(zip(AXES, sizes, strict=True))}"
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise UserError(f"{setting}: sizes must be positive; at most one may be -1")
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // math.prod(s for s in sizes if s != -1)
    if math.prod(sizes) != len(devices):
        raise UserError(f"{setting}: the product of sizes is not {len(devices)}, the device count")
    array = _device_array(sizes, setting, devices)
    return jax.sharding.Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _device_array(sizes: list[int], setting: str, devices: Sequence[Any]) -> np.ndarray:
    """Returns the devices in an order that fits their interconnect.

    jax.make_mesh refuses several slices (nodes of a GPU cluster count as slices there) and does not
    split a physical axis of a v6e or v5p.
    """
    slices = 1
    if devices[0].platform == "tpu":
        slices = len({getattr(device, "slice_index", 0) for device in devices})
    if sizes[0] % slices:
        raise UserError(
            f"{setting}: data is {sizes[0]} on {slices} TPU slices: make it a multiple of "
            f"{slices}, because fsdp and tensor stay within a slice"
        )
    try:
        if slices == 1:
            return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        per_slice = (sizes[0] // slices, *sizes[1:])
        return mesh_utils.create_hybrid_device_mesh(
            per_slice, (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    except (NotImplementedError, ValueError) as e:
        reason = str(e).split("\n")[0]
        raise UserError(f"{setting} does not fit the topology of the devices: {reason}") from None


def shard_state(mesh: jax.sharding.Mesh, abstract: Any) -> Any:
    """Returns a tree of NamedSharding for a tree of parameters, optimizer state or both.

    Raises UserError if an axis of the mesh does not divide a dimension it splits.
    """

    def leaf_sharding(path, leaf):
        spec = param_rules.match(RULES, param_rules.path_of(path)) if leaf.ndim else P()
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                raise UserError(
                    f"{param_rules.path_of(path)} {leaf.shape} cannot be split over "
                    f"{axis}={mesh.shape[axis]}: change config.mesh"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(leaf_sharding, abstract)


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Sharding of an array of which every device has a copy."""
    return NamedSharding(mesh, P())


def make_global_array(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Returns a host array, the same in every process, as a global array."""
    with jax.transfer_guard("allow"):  # as explicit as jax.device_put, which JAX does not know
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Sharding of a batch: examples over data and fsdp."""
    return NamedSharding(mesh, BATCH)


def microbatch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Sharding of a batch split into (micro-batches, examples, ...)."""
    return NamedSharding(mesh, P(None, *BATCH))


def on_mesh(function: Callable, mesh: jax.sharding.Mesh) -> Callable:
    """Returns `function`, traced with the mesh that shard_map_heads and `platform` need."""

    @functools.wraps(function)
    def traced(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced


def platform() -> str | None:
    """Platform of the mesh in a trace: "cpu", "gpu" or "tpu"; None outside of `on_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh.abstract_device.platform


def shard_map_heads(function: Callable, arrays: Any, replicated: Any, out_like: Any) -> Any:
    """Returns function(arrays, replicated), where each device has its own examples and heads.

    For kernels, which the compiler cannot split. arrays: a tree of (…, B, N, heads · width).
    replicated: a tree of replicated arrays. out_like: a tree of arrays with the ranks of the
    result, which is split like `arrays`.
    """

    def split(tree):
        return jax.tree.map(lambda x: P(*[None] * (x.ndim - 3), *BATCH, None, "tensor"), tree)

    return jax.shard_map(
        function,
        in_specs=(split(arrays), P()),
        out_specs=split(out_like),
        check_vma=False,
    )(arrays, replicated)


def shard_map_batch(function: Callable, arrays: Any, replicated: Any, out_like: Any) -> Any:
    """Like shard_map_heads, with arrays and results split along their first axis only."""
    specs = jax.tree.map(lambda _: BATCH, out_like)
    return jax.shard_map(function, in_specs=(BATCH, P()), out_specs=specs, check_vma=False)(
        arrays, replicated
    )


def map_over_shards(
    function: Callable, mesh: jax.sharding.Mesh, replicated: Any, batches: Any
) -> Any:
    """Returns function(replicated, shard) of every device, concatenated and sharded like a batch.

    batches: a tree of arrays with microbatch_sharding, of which each device gets its shard. Results
    of `function` have a leading axis of size 1.
    """
    return jax.shard_map(
        function, mesh=mesh, in_specs=(P(), P(None, *BATCH)), out_specs=BATCH, check_vma=False
    )(replicated, batches)


def sum_over_shards(
    function: Callable, mesh: jax.sharding.Mesh, replicated: Any, batches: Any
) -> Any:
    """Returns the sum of function(replicated, shard) over all devices, replicated."""

    def summed(replicated, shard):
        return jax.lax.psum(function(replicated, shard), BATCH[0])

    return jax.shard_map(
        summed, mesh=mesh, in_specs=(P(), P(None, *BATCH)), out_specs=P(), check_vma=False
    )(replicated, batches)


def batch_shards(mesh: jax.sharding.Mesh) -> int:
    """Number of shards of a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


@functools.lru_cache  # called for every batch
def process_rows(
    mesh: jax.sharding.Mesh, batch_size: int, process: int | None = None
) -> np.ndarray:
    """Returns the rows of a global batch on the devices of a process (None: this), ascending.

    They may have gaps: the mesh follows the interconnect of a pod, not its hosts.
    Raises UserError if the batch size is not divisible by the number of shards.
    """
    shards = batch_shards(mesh)
    if batch_size % shards:
        raise UserError(
            f"batch size {batch_size} is not divisible by {shards}, the devices of data × fsdp"
        )
    process = jax.process_index() if process is None else process
    indices = batch_sharding(mesh).devices_indices_map((batch_size,)).items()
    ranges = {i[0].indices(batch_size) for device, i in indices if device.process_index == process}
    return np.concatenate([np.arange(*rows) for rows in sorted(ranges)])


def take_local(batch: Any, count: int) -> Any:
    """Returns at most `count` of this process's examples of a global batch, as NumPy arrays."""
    return jax.tree.map(lambda x: np.asarray(x.addressable_shards[0].data)[:count], batch)


def global_batch(mesh: jax.sharding.Mesh, batch_size: int, local: Any) -> Any:
    """Returns global arrays of `batch_size` examples from this process's rows, a tree of arrays."""
    rows, sharding = process_rows(mesh, batch_size), batch_sharding(mesh)

    def make_global(x):
        def shard_of(index):
            start, stop, _ = index[0].indices(batch_size)
            offset = np.searchsorted(rows, start)
            return x[offset : offset + stop - start]

        shape = (batch_size, *np.shape(x)[1:])
        return jax.make_array_from_callback(shape, sharding, shard_of)

    with jax.transfer_guard("allow"):  # as in make_global_array
        return jax.tree.map(make_global, local)
