"""Checkpoints on disk: parameters, optimizer state and JSON metadata as three items of Orbax.

Parameters alone open on any machine, as NumPy arrays, whatever topology wrote them. The metadata
hold a checksum of every array (checksums.py) and one of themselves, which are compared when they
are read. A training state is saved and continued by saving.py; no other file imports Orbax.
"""

import contextlib
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from dgpt_jax import checksums
from dgpt_jax.schema import UserError

# 1: before optim.Guarded, whose state is another one. 3: with a moving average of the parameters in
# the optimizer state, which is what load_params gives; without one 2 is still written.
FORMAT, OLDEST = 3, 2
CURE = "Copy it again, or move that step's directory away: the step before it is then read"
# How TensorStore begins what is a fault of the way to the files, and none of theirs.
UNREACHABLE = re.compile(
    "UNAVAILABLE|PERMISSION_DENIED|UNAUTHENTICATED|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED"
)


def directory(workdir) -> str:
    """Where a run keeps its checkpoints; absolute, because Orbax refuses relative paths late."""
    text = os.fspath(workdir)
    text = text if "://" in text else os.path.abspath(text)
    return os.path.join(text, "checkpoints")


def sealed(metadata: dict[str, Any], arrays: dict[str, Any]) -> dict[str, Any]:
    """JSON metadata with the checksums of {"params": tree, "opt_state": tree}, and its own."""
    content = metadata | {"checksums": checksums.of_tree(arrays)}
    return content | {"checksum": checksums.of_json(content)}


def checked(metadata: dict, path) -> dict:
    """The metadata of a checkpoint in `path`. Raises UserError where they are of later code, or
    have been changed since they were saved."""
    if metadata["format"] > FORMAT:
        raise UserError(
            f"{path} has checkpoint format {metadata['format']}, this code reads {FORMAT}"
        )
    content = {name: value for name, value in metadata.items() if name != "checksum"}
    if "checksum" in metadata and checksums.of_json(content) != metadata["checksum"]:
        raise UserError(f"{path} is damaged: its metadata are not those that were saved. {CURE}")
    return metadata


def verify(found: dict[str, str], metadata: dict, path, wanted: Callable = lambda name: True):
    """Compares the checksums of arrays that were read with those in a checkpoint's metadata.

    wanted: tells of a name in the metadata whether its array was to be read. Raises UserError for
    an array that is missing or another. Without checksums (older code wrote none) it says so.
    """
    if "checksums" not in metadata:
        print(f"{path} has no checksums: its arrays are not checked", file=sys.stderr)
        return
    saved = {name: value for name, value in metadata["checksums"].items() if wanted(name)}
    if missing := sorted(saved.keys() - found.keys()):
        raise UserError(f"{path} is damaged: {missing[0]} is missing. {CURE}")
    for name, value in found.items():
        if saved.get(name) != value:
            raise UserError(f"{path} is damaged: {name} is not what was saved. {CURE}")


@contextlib.contextmanager
def damage_is_told(item):
    """A context: what Orbax raises on files that are cut, changed or missing is a UserError, and so
    is what it raises where they cannot be reached, in other words."""
    try:
        yield
    except (UserError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as e:
        sys.unraisablehook = _without_late_reads
        reason = (str(e).strip().splitlines() or [""])[0][:300] or type(e).__name__
        missing = isinstance(e, (FileNotFoundError, NotADirectoryError))
        if (isinstance(e, OSError) and not missing) or UNREACHABLE.search(reason):
            raise UserError(f"{item} cannot be read: {reason}") from e
        raise UserError(f"{item} is damaged: {reason}. {CURE}") from e


def steps(path) -> list[int]:
    """The steps of a work directory's finished checkpoints, ascending. Raises UserError."""
    root = directory(path)
    found = []
    if os.path.isdir(root) or "://" in root:
        found = ocp.utils.checkpoint_steps(root)
    if not found:
        raise UserError(f"{path} holds no finished checkpoint (looked in {root})")
    return sorted(found)


def find(path, step: int | None = None) -> tuple[str, int]:
    """(directory of checkpoints, step, default the newest) of a work directory. UserError."""
    found = steps(path)
    if step not in (None, *found):
        has = ", ".join(map(str, found))
        raise UserError(f"{path} holds no finished checkpoint of step {step}: it has {has}")
    return directory(path), found[-1] if step is None else step


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
            metadata=ocp.args.JsonSave(
                sealed({"format": OLDEST, "step": step} | metadata, {"params": params})
            ),
        )
        writer.save(item, args=arguments)


def _without_late_reads(unraisable, before=sys.unraisablehook):
    """A sys.unraisablehook: reads that end after the one that failed print nothing."""
    if str(unraisable.exc_value) != "Event loop is closed":
        before(unraisable)


@contextlib.contextmanager
def _reader(item: epath.Path):
    """An Orbax checkpointer for one checkpoint. Raises UserError where it is damaged."""
    handler = ocp.CompositeCheckpointHandler(
        params=ocp.PyTreeCheckpointHandler(),
        opt_state=ocp.PyTreeCheckpointHandler(),  # of which only a moving average is read
        metadata=ocp.JsonCheckpointHandler(),
    )
    with damage_is_told(item), ocp.Checkpointer(handler) as reader:
        yield reader


def load_params(path, step: int | None = None, parts=None) -> tuple[dict, dict]:
    """(nested parameters as NumPy arrays, metadata) of a work directory's checkpoint.

    step: default the newest. parts: names of subtrees or arrays ("encoder", "next/pred/kernel"),
    the only ones that are read; those that are not there are left out. Where a moving average was
    kept, it is what is read. Needs no devices like those that wrote it, and does not read the rest
    of the optimizer state. Raises UserError for a checkpoint that is damaged, or lacks the average.
    """
    root, step = find(path, step)
    item = epath.Path(root) / str(step)
    with _reader(item) as reader:
        asked = ocp.args.Composite(metadata=ocp.args.JsonRestore())
        metadata = checked(reader.restore(item, args=asked)["metadata"], item)
        place, tree = _evaluated(reader.metadata(item).item_metadata, metadata, item)
        tree = tree if parts is None else _chosen(tree, parts)
        params = _read(reader, item, place, tree) if tree else {}

    def wanted(name: str) -> bool:
        inner = name.removeprefix(f"{'/'.join(place)}/")
        return inner != name and (parts is None or _is_part(inner, parts))

    verify(checksums.of_tree(_nested(place, params)), metadata, item, wanted)
    return params, metadata


def _evaluated(stored, metadata: dict, item) -> tuple[tuple[str, ...], dict]:
    """(names of the trees that hold it, tree) of what is read of a checkpoint: the moving average
    (optim.Averaged), where the metadata promise one. Raises UserError where it is missing."""
    if metadata["format"] < FORMAT:
        return ("params",), stored["params"].tree
    if stored.get("opt_state") is None:
        raise UserError(
            f"{item} lacks opt_state, and with it the moving average of the parameters "
            f"(config.optim.ema), which is what this run measures: copy opt_state too, or extract "
            f"the average where it is (tools/checkpoint.py extract)"
        )
    return ("opt_state", "inner", "ema"), stored["opt_state"].tree["inner"]["ema"]


def _read(reader, item, place: tuple[str, ...], tree: dict) -> dict:
    """The arrays of a part of a checkpoint."""
    how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), _nested(place[1:], tree))
    asked = ocp.args.PyTreeRestore(
        item=_nested(place[1:], tree), restore_args=how, partial_restore=True
    )
    found = reader.restore(item, args=ocp.args.Composite(**{place[0]: asked}))
    for name in place:
        found = found[name]
    return found


def _nested(names: tuple[str, ...], tree) -> dict:
    for name in reversed(names):
        tree = {name: tree}
    return tree


def _is_part(name: str, parts) -> bool:
    """Whether an array is one of `parts`, or in a subtree that is."""
    names = name.split("/")
    return any("/".join(names[:length]) in parts for length in range(1, len(names) + 1))


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


def describe(path, step: int | None = None) -> list[tuple[str, tuple, str, str, int]]:
    """(name, shape, dtype, sharding as it was written, bytes) of every array; reads no array.

    Names begin with params or opt_state.
    """
    root, step = find(path, step)
    item = epath.Path(root) / str(step)
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
