"""The mesh, and where parameters and batches lie on it. The only file that names mesh axes."""

import functools
import math
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import mesh_utils
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
    (r"blocks/.*(qkv|q|kv)/kernel$", P(None, None, "fsdp", "tensor")),
    (r"blocks/.*(qkv|q|kv)/bias$", P(None, None, "tensor")),
    (r"blocks/.*proj/kernel$", P(None, "tensor", "fsdp")),
    (r"blocks/.*fc1/kernel$", P(None, "fsdp", "tensor")),
    (r"blocks/.*fc1/bias$", P(None, "tensor")),
    (r"blocks/.*fc2/kernel$", P(None, "tensor", "fsdp")),
    (r"(patch_embed|enc2dec|pred)/kernel$", P(None, "fsdp")),
    (r".*", P()),
)


def make_mesh(config: Mesh, devices=None) -> jax.sharding.Mesh:
    """The mesh over all devices, with -1 resolved; UserError where sizes do not fit.

    Where TPU slices are joined by a network, that network lies along data: fsdp and tensor, which
    exchange more, stay within a slice.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    named = f"config.mesh {dict(zip(AXES, sizes, strict=True))}"
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise UserError(f"{named}: sizes are positive, and one of them may be -1")
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // math.prod(s for s in sizes if s != -1)
    if math.prod(sizes) != len(devices):
        raise UserError(f"{named} does not multiply to the {len(devices)} devices there are")
    placed = _place(sizes, named, devices)
    return jax.sharding.Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _place(sizes: list[int], named: str, devices) -> np.ndarray:
    """The devices in the order that suits their wires. jax.make_mesh would refuse several slices
    (to which it also counts the nodes of a GPU cluster), and to split an axis of a v6e or v5p."""
    slices = 1
    if devices[0].platform == "tpu":
        slices = len({getattr(device, "slice_index", 0) for device in devices})
    if sizes[0] % slices:
        raise UserError(
            f"{named}: data is {sizes[0]} on {slices} TPU slices: make it a multiple of {slices}, "
            f"because fsdp and tensor stay within a slice"
        )
    try:
        if slices == 1:
            return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        within = (sizes[0] // slices, *sizes[1:])
        return mesh_utils.create_hybrid_device_mesh(
            within, (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    except (NotImplementedError, ValueError) as e:
        reason = str(e).split("\n")[0]
        raise UserError(f"{named} cannot be laid on these devices: {reason}") from None


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


def placed(array: np.ndarray, place: NamedSharding) -> jax.Array:
    """A host array, the same on every process, laid out on the mesh."""
    return jax.make_array_from_callback(array.shape, place, lambda index: array[index])


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Examples over data and fsdp."""
    return NamedSharding(mesh, BATCH)


def microbatch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """A batch cut into (micro-batches, examples, ...)."""
    return NamedSharding(mesh, P(None, *BATCH))


def on_mesh(function: Callable, mesh: jax.sharding.Mesh) -> Callable:
    """The function, traced so that `per_shard` and `platform` within it know the mesh."""

    @functools.wraps(function)
    def traced(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced


def platform() -> str | None:
    """Where what is being traced will run, "cpu", "gpu" or "tpu"; None outside of `on_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh.abstract_device.platform


def per_shard(function: Callable, arrays, whole, like):
    """function(arrays, whole), each device on its own examples and heads, because the compiler
    cannot split a kernel. `arrays`: a tree of (…, B, N, what splits by heads); whole: a tree of
    what every device needs all of; `like` has the ranks of the result, which is as `arrays` are."""

    def split(tree):
        return jax.tree.map(lambda x: P(*[None] * (x.ndim - 3), *BATCH, None, "tensor"), tree)

    return jax.shard_map(
        function,
        in_specs=(split(arrays), P()),
        out_specs=split(like),
        check_vma=False,
    )(arrays, whole)


def per_example(function: Callable, arrays, whole, like):
    """As `per_shard`, where arrays and results split along their first axis, and not by heads."""
    found = jax.tree.map(lambda _: BATCH, like)
    return jax.shard_map(function, in_specs=(BATCH, P()), out_specs=found, check_vma=False)(
        arrays, whole
    )


def each_part(function: Callable, mesh: jax.sharding.Mesh, whole, parts):
    """function(whole, part) on every device, where `part` is what the device holds of `parts`, a
    tree of arrays as microbatch_sharding lays them. A result has a leading axis of 1 on each
    device; together they have one of devices, split like a batch."""
    return jax.shard_map(
        function, mesh=mesh, in_specs=(P(), P(None, *BATCH)), out_specs=BATCH, check_vma=False
    )(whole, parts)


def sum_over_shards(function: Callable, mesh: jax.sharding.Mesh, whole, parts):
    """The sum of function(whole, part) over all devices, on each of them; as in `each_part`."""

    def summed(whole, part):
        return jax.lax.psum(function(whole, part), BATCH[0])

    return jax.shard_map(
        summed, mesh=mesh, in_specs=(P(), P(None, *BATCH)), out_specs=P(), check_vma=False
    )(whole, parts)


def batch_shards(mesh: jax.sharding.Mesh) -> int:
    """Into how many parts a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


@functools.lru_cache  # asked for every batch
def process_rows(
    mesh: jax.sharding.Mesh, batch_size: int, process: int | None = None
) -> np.ndarray:
    """The rows of a global batch that the devices of a process (None: this one) hold, ascending.

    They need not be next to each other: a mesh follows the wires of a pod, not its hosts.
    """
    shards = batch_shards(mesh)
    if batch_size % shards:
        raise UserError(
            f"a batch of {batch_size} is not divisible by the {shards} devices of data × fsdp"
        )
    process = jax.process_index() if process is None else process
    indices = batch_sharding(mesh).devices_indices_map((batch_size,)).items()
    held = {i[0].indices(batch_size) for device, i in indices if device.process_index == process}
    return np.concatenate([np.arange(*rows) for rows in sorted(held)])


def some(batch, count: int):
    """At most `count` examples of a global batch that this process holds, as NumPy arrays."""
    return jax.tree.map(lambda x: np.asarray(x.addressable_shards[0].data)[:count], batch)


def global_batch(mesh: jax.sharding.Mesh, batch_size: int, local):
    """Global arrays of `batch_size` examples from this process's rows, a tree of NumPy arrays."""
    rows, sharding = process_rows(mesh, batch_size), batch_sharding(mesh)

    def place(x):
        def of_a_device(index):
            start, stop, _ = index[0].indices(batch_size)
            at = np.searchsorted(rows, start)
            return x[at : at + stop - start]

        shape = (batch_size, *np.shape(x)[1:])
        return jax.make_array_from_callback(shape, sharding, of_a_device)

    return jax.tree.map(place, local)
