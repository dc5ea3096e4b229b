"""Checkpoints on disk: parameters, optimizer state and JSON metadata as three Orbax items.

Parameters alone open on any machine as NumPy arrays, whatever topology saved them. The metadata
hold checksums, which are verified on reading (checkpoint_metadata.py).
Training states are saved and restored by training/checkpointing.py; no other file imports Orbax.
"""

import contextlib
import os
from collections.abc import Collection, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from dgpt_jax import invocation
from dgpt_jax.errors import UserError
from dgpt_jax.storage import checkpoint_metadata, checksums, gcs, orbax_errors
from dgpt_jax.storage.checkpoint_metadata import FORMAT, OLDEST
from dgpt_jax.storage.gcs import AnyPath

# Name, shape, dtype, sharding when saved, and bytes of an array.
Row = tuple[str, tuple[int, ...], str, str, int]


def directory(workdir: AnyPath) -> str:
    """Returns the checkpoint directory of a run, absolute since Orbax rejects relative paths."""
    root = os.fspath(workdir) if gcs.is_remote(workdir) else os.path.abspath(workdir)
    return os.path.join(root, "checkpoints")


def steps(path: AnyPath) -> list[int]:
    """Returns the steps of a work directory's finished checkpoints, ascending. Raises UserError if
    there are none."""
    root = directory(path)
    exists = gcs.is_remote(root) or os.path.isdir(root)
    finished = ocp.utils.checkpoint_steps(root) if exists else []
    if not finished:
        raise UserError(f"{path} has no finished checkpoint (looked in {root})")
    return sorted(finished)


def find(path: AnyPath, step: int | None = None) -> tuple[str, int]:
    """Returns (checkpoint directory, step) of a work directory; step: default the newest.

    Raises UserError if there is no such checkpoint.
    """
    finished = steps(path)
    if step not in (None, *finished):
        has = ", ".join(map(str, finished))
        raise UserError(f"{path} has no finished checkpoint of step {step}: it has {has}")
    return directory(path), finished[-1] if step is None else step


def save_params(workdir: AnyPath, step: int, params: Any, metadata: dict[str, Any]) -> None:
    """Saves a checkpoint of parameters alone, NumPy arrays, into a work directory that has none.

    Takes no further memory. By default Orbax copies all arrays first, in case they change while it
    writes in the background, and compresses all of them at once, which saves 8 % of a file. Raises
    OSError.
    """
    item = epath.Path(directory(workdir)) / str(step)
    registry = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),
    )
    handler = ocp.CompositeCheckpointHandler(
        params=ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry),
        metadata=ocp.JsonCheckpointHandler(),
    )
    orbax_errors.hide_repeated_errors()
    with ocp.Checkpointer(handler) as writer:
        arguments = ocp.args.Composite(
            params=ocp.args.PyTreeSave(params),
            metadata=ocp.args.JsonSave(
                checkpoint_metadata.with_checksums(
                    {"format": OLDEST, "step": step} | metadata, {"params": params}
                )
            ),
        )
        try:
            writer.save(item, args=arguments)
        except Exception as e:
            if problem := orbax_errors.disk_problem(e):
                raise OSError(problem) from e
            raise


@contextlib.contextmanager
def _reader(item: epath.Path) -> Iterator[ocp.Checkpointer]:
    """Context of an Orbax checkpointer for one checkpoint. Raises UserError if it is damaged."""
    handler = ocp.CompositeCheckpointHandler(
        params=ocp.PyTreeCheckpointHandler(),
        opt_state=ocp.PyTreeCheckpointHandler(),  # only its moving average is read
        metadata=ocp.JsonCheckpointHandler(),
    )
    with orbax_errors.translate_damage(item), ocp.Checkpointer(handler) as reader:
        yield reader


def load_params(
    path: AnyPath, step: int | None = None, names: Collection[str] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns (nested parameters as NumPy arrays, metadata) of a work directory's checkpoint.

    With a moving average of the parameters in the checkpoint, returns the average. The rest of the
    optimizer state is not read, and the devices that saved it are not needed.
    step: default the newest. names: of the subtrees or arrays to read ("encoder",
    "next/pred/kernel"), default all; unknown names are ignored. Raises UserError if the checkpoint
    is damaged or lacks the average.
    """
    root, step = find(path, step)
    item = epath.Path(root) / str(step)
    with _reader(item) as reader:
        args = ocp.args.Composite(metadata=ocp.args.JsonRestore())
        metadata = checkpoint_metadata.check(reader.restore(item, args=args)["metadata"], item)
        prefix, tree = _eval_tree(reader.metadata(item).item_metadata, metadata, item)
        tree = tree if names is None else _select(tree, names)
        params = _read(reader, item, prefix, tree) if tree else {}

    def is_requested(name: str) -> bool:
        inner = name.removeprefix(f"{'/'.join(prefix)}/")
        return inner != name and (names is None or _is_below(inner, names))

    sums = checksums.of_tree(_nest(prefix, params))
    checkpoint_metadata.verify_arrays(sums, metadata, item, is_requested)
    return params, metadata


def _eval_tree(stored: Any, metadata: dict, item: epath.Path) -> tuple[tuple[str, ...], dict]:
    """(names of the enclosing trees, tree) of the parameters to evaluate: the moving average in the
    optimizer state, if the metadata promise one. Raises UserError if it is missing."""
    if metadata["format"] < FORMAT:
        return ("params",), stored["params"].tree
    if stored.get("opt_state") is None:
        raise UserError(
            f"{item} lacks opt_state, which contains the moving average of the parameters "
            f"(config.optim.ema) that is evaluated: copy opt_state too, or extract the average "
            f"where it is ({invocation.command('checkpoint')} extract)"
        )
    return ("opt_state", "inner", "ema"), stored["opt_state"].tree["inner"]["ema"]


def _read(reader: ocp.Checkpointer, item: epath.Path, prefix: tuple[str, ...], tree: dict) -> dict:
    """Arrays of one tree of a checkpoint."""
    nested = _nest(prefix[1:], tree)
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), nested)
    args = ocp.args.PyTreeRestore(item=nested, restore_args=as_numpy, partial_restore=True)
    restored = reader.restore(item, args=ocp.args.Composite(**{prefix[0]: args}))
    for name in prefix:
        restored = restored[name]
    return restored


def _nest(names: tuple[str, ...], tree: Any) -> dict:
    for name in reversed(names):
        tree = {name: tree}
    return tree


def _is_below(name: str, ancestors: Collection[str]) -> bool:
    """True if an array is one of `ancestors`, or in a subtree that is."""
    keys = name.split("/")
    return any("/".join(keys[:length]) in ancestors for length in range(1, len(keys) + 1))


def _select(tree: dict, names: Collection[str], prefix: str = "") -> dict:
    """The subtrees and arrays of a tree whose names are among `names`."""
    selected = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if name in names:
            selected[key] = value
        elif isinstance(value, dict) and (inner := _select(value, names, f"{name}/")):
            selected[key] = inner
    return selected


def describe(path: AnyPath, step: int | None = None) -> list[Row]:
    """Returns (name, shape, dtype, sharding when saved, bytes) of every array, reading none.

    Names begin with params or opt_state. Raises UserError.
    """
    root, step = find(path, step)
    item = epath.Path(root) / str(step)
    with _reader(item) as reader:
        stored: Any = reader.metadata(item).item_metadata
    rows = []
    for root_name in ("params", "opt_state"):
        if stored.get(root_name) is None:  # a conversion has no optimizer state
            continue
        for path_, leaf in jax.tree_util.tree_leaves_with_path(stored[root_name].tree):
            name = f"{root_name}/{checksums.name_of(path_)}"
            size = int(np.prod(leaf.shape, dtype=np.int64)) * np.dtype(leaf.dtype).itemsize
            rows.append((name, tuple(leaf.shape), str(leaf.dtype), _sharding(leaf), size))
    return rows


def read_metadata(path: AnyPath, step: int | None = None) -> tuple[dict[str, Any], dict[str, int]]:
    """Returns (JSON metadata, {axis: devices} of the mesh that saved a checkpoint), reading no
    arrays. A conversion has no mesh: {}. step: default the newest. Raises UserError."""
    root, step = find(path, step)
    item = epath.Path(root) / str(step)
    with _reader(item) as reader:
        args = ocp.args.Composite(metadata=ocp.args.JsonRestore())
        metadata = checkpoint_metadata.check(reader.restore(item, args=args)["metadata"], item)
        stored: Any = reader.metadata(item).item_metadata
        shardings = [leaf.sharding for leaf in jax.tree.leaves(stored["params"].tree)]
    saved = next((s for s in shardings if getattr(s, "axis_names", None)), None)
    mesh = dict(zip(saved.axis_names, saved.shape.tolist(), strict=True)) if saved else {}
    return metadata, mesh


def _sharding(leaf: Any) -> str:
    """(12, 64, 256) sharded over four devices along its second axis: "1, fsdp 4, 1"."""
    spec = getattr(leaf.sharding, "partition_spec", None) or ()
    if not any(spec):
        return "replicated"
    mesh = dict(zip(leaf.sharding.axis_names, leaf.sharding.shape.tolist(), strict=True))
    axes = [(a,) if isinstance(a, str) else a or () for a in spec]
    return ", ".join(" ".join(f"{a} {mesh[a]}" for a in names) or "1" for names in axes)
