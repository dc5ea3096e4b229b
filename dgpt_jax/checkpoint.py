"""Checkpoints on disk: parameters, optimizer state and JSON metadata as three items of Orbax.

Parameters alone open on any machine, as NumPy arrays, whatever topology wrote them. A training
state is saved and continued by saving.py; no other file imports Orbax.
"""

import contextlib
import os
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from dgpt_jax.schema import UserError

# 1: before optim.Guarded, whose state is another one. 3: with a moving average of the parameters in
# the optimizer state, which is what load_params gives; without one 2 is still written.
FORMAT, OLDEST = 3, 2


def directory(workdir) -> str:
    """Where a run keeps its checkpoints; absolute, because Orbax refuses relative paths late."""
    text = os.fspath(workdir)
    text = text if "://" in text else os.path.abspath(text)
    return os.path.join(text, "checkpoints")


def checked(metadata: dict, path) -> dict:
    """The metadata of a checkpoint in `path`. Raises UserError for a format of later code."""
    if metadata["format"] > FORMAT:
        raise UserError(
            f"{path} has checkpoint format {metadata['format']}, this code reads {FORMAT}"
        )
    return metadata


def steps(path) -> list[int]:
    """The steps of a work directory's finished checkpoints, ascending. Raises UserError."""
    root = directory(path)
    found = []
    if os.path.isdir(root) or "://" in root:
        found = ocp.utils.checkpoint_steps(root)
    if not found:
        raise UserError(f"{path} holds no finished checkpoint (looked in {root})")
    return sorted(found)


def find(path) -> tuple[str, int]:
    """(directory of checkpoints, newest step) of a work directory. Raises UserError."""
    return directory(path), steps(path)[-1]


def save_params(workdir, step: int, params, metadata: dict[str, Any]):
    """Writes a checkpoint of parameters alone, NumPy arrays, into a work directory that has none.

    In no memory of its own. By default Orbax copies all arrays first, lest they change while it
    writes in the background, and compresses all of them at once, for 8 % of a file.
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
    with ocp.Checkpointer(handler) as writer:
        arguments = ocp.args.Composite(
            params=ocp.args.PyTreeSave(params),
            metadata=ocp.args.JsonSave({"format": OLDEST, "step": step} | metadata),
        )
        writer.save(item, args=arguments)


@contextlib.contextmanager
def _reader(item: epath.Path):
    """An Orbax checkpointer for one checkpoint. Raises UserError where files are cut or missing."""
    handler = ocp.CompositeCheckpointHandler(
        params=ocp.PyTreeCheckpointHandler(),
        opt_state=ocp.PyTreeCheckpointHandler(),  # of which only a moving average is read
        metadata=ocp.JsonCheckpointHandler(),
    )
    try:
        with ocp.Checkpointer(handler) as reader:
            yield reader
    except (ValueError, OSError) as e:
        raise UserError(f"{item} is damaged: {str(e).splitlines()[0][:300]}") from e


def load_params(path, step: int | None = None, parts=None) -> tuple[dict, dict]:
    """(nested parameters as NumPy arrays, metadata) of a work directory's checkpoint.

    step: default the newest. parts: names of subtrees or arrays ("encoder", "next/pred/kernel"),
    the only ones that are read; those that are not there are left out. Where a moving average was
    kept, it is what is read. Needs no devices like those that wrote it, and does not read the rest
    of the optimizer state.
    """
    root, newest = find(path)
    step = newest if step is None else step
    item = epath.Path(root) / str(step)
    with _reader(item) as reader:
        stored = reader.metadata(item).item_metadata
        average = _average(stored)
        tree = stored["params"].tree if average is None else average
        tree = tree if parts is None else _chosen(tree, parts)
        items = {"params": tree} if average is None else {"opt_state": {"inner": {"ema": tree}}}
        kind = ocp.RestoreArgs(restore_type=np.ndarray)
        asked = {
            name: ocp.args.PyTreeRestore(
                item=tree, restore_args=jax.tree.map(lambda _: kind, tree), partial_restore=True
            )
            for name, tree in items.items()
        }
        asked = asked if tree else {}  # none of the parts is there
        arguments = ocp.args.Composite(metadata=ocp.args.JsonRestore(), **asked)
        found = reader.restore(item, args=arguments)
    params = {}
    if tree:
        params = found["params"] if average is None else found["opt_state"]["inner"]["ema"]
    return params, checked(found["metadata"], root)


def _chosen(tree: dict, parts, prefix: str = "") -> dict:
    """The subtrees and arrays of a tree whose names are among `parts`."""
    chosen = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if name in parts:
            chosen[key] = value
        elif isinstance(value, dict) and (inner := _chosen(value, parts, f"{name}/")):
            chosen[key] = inner
    return chosen


def _average(stored):
    """The tree of the moving average (optim.Averaged) in a checkpoint's metadata, or None."""
    tree = stored["opt_state"].tree if stored.get("opt_state") is not None else None
    for name in ("inner", "ema"):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def describe(path, step: int | None = None) -> list[tuple[str, tuple, str, str, int]]:
    """(name, shape, dtype, sharding as it was written, bytes) of every array; reads no array.

    Names begin with params or opt_state.
    """
    root, newest = find(path)
    item = epath.Path(root) / str(newest if step is None else step)
    with _reader(item) as reader:
        found = reader.metadata(item).item_metadata
    rows = []
    for part in ("params", "opt_state"):
        if found.get(part) is None:  # a conversion has no optimizer state
            continue
        for keys, leaf in jax.tree_util.tree_leaves_with_path(found[part].tree):
            name = "/".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in keys)
            size = int(np.prod(leaf.shape, dtype=np.int64)) * np.dtype(leaf.dtype).itemsize
            row = (f"{part}/{name}", tuple(leaf.shape), str(leaf.dtype), _place(leaf), size)
            rows.append(row)
    return rows


def _place(leaf) -> str:
    """(12, 64, 256) split over four devices along its second axis: "1, fsdp 4, 1"."""
    spec = getattr(leaf.sharding, "partition_spec", None) or ()
    if not any(spec):
        return "whole"
    mesh = dict(zip(leaf.sharding.axis_names, leaf.sharding.shape.tolist(), strict=True))
    axes = [(a,) if isinstance(a, str) else a or () for a in spec]
    return ", ".join(" ".join(f"{a} {mesh[a]}" for a in names) or "1" for names in axes)
