"""Checkpoints: Orbax, asynchronous; parameters, optimizer state and JSON metadata as three items.

Parameters alone open on any machine, as NumPy arrays, whatever topology wrote them. A training
state opens on any mesh. The only file that imports Orbax.
"""

import contextlib
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from dgpt_jax import hosts
from dgpt_jax.schema import UserError
from dgpt_jax.state import TrainState

TRIES = 3
FORMAT = 2  # 1: before optim.Guarded, whose state is another one


def directory(workdir) -> str:
    """Where a run keeps its checkpoints; absolute, because Orbax refuses relative paths late."""
    text = os.fspath(workdir)
    text = text if "://" in text else os.path.abspath(text)
    return os.path.join(text, "checkpoints")


class Checkpoints:
    """The checkpoints of a run, a context: saving goes on in the background, leaving it waits.

    Kept are the newest `keep`, those at multiples of `keep_every` steps (0: none), and the one with
    the best value of the metric `best` ("": none).
    """

    def __init__(self, workdir, *, keep: int, keep_every: int = 0, best: str = ""):
        policies = [preservation_policy.LatestN(keep)]
        if keep_every:
            policies.append(preservation_policy.EveryNSteps(keep_every))
        if best:
            policies.append(
                preservation_policy.BestN(
                    get_metric_fn=lambda found: found[best],
                    reverse=is_loss(best),
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies), create=True
        )
        self._failures = 0
        self._manager = ocp.CheckpointManager(
            directory(workdir),
            options=options,
            item_names=("params", "opt_state", "metadata"),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *_):
        # One of several processes that fails must say so and end. The save in flight waits for the
        # others, and they may wait for this one: what is not complete by now is never to be.
        if kind is None or not hosts.together():
            self.close()

    @property
    def directory(self) -> str:
        return str(self._manager.directory)

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState, metadata: dict[str, Any], metrics: dict | None = None):
        """Starts saving; `metadata` is JSON, `metrics` what was measured at this step.

        Raises RuntimeError where Orbax declines, UserError on a full or read-only disk; what goes
        wrong in the background, `failed` tells.
        """
        step = int(state.step)
        with self._disk_is_the_users():
            saved = self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    opt_state=ocp.args.StandardSave(state.opt_state),
                    metadata=ocp.args.JsonSave({"format": FORMAT, "step": step} | metadata),
                ),
                metrics=metrics,
            )
        if not saved:
            raise RuntimeError(
                f"the checkpoint of step {step} was not saved: {self.directory} holds "
                f"step {self._manager.latest_step()}"
            )

    def failed(self, *, wait: bool = False) -> bool:
        """Whether the last save failed in the background, so that the state should be saved again.

        Raises its cause the third time in a row, and where other processes saw it succeed, which
        would not join in. `wait`: until it has ended.
        """
        try:
            with self._disk_is_the_users():
                if wait:
                    self._manager.wait_until_finished()
                self._manager.check_for_errors()
        except UserError:
            raise
        except Exception:
            self._failures += 1
            if hosts.together() or self._failures == TRIES:
                raise
            return True
        if not self._manager.is_saving_in_progress():
            self._failures = 0
        return False

    def metadata(self, step: int) -> dict:
        return _checked(
            self._manager.restore(step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore()))[
                "metadata"
            ],
            self.directory,
        )

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state of a step, placed as `abstract` (shapes, dtypes, shardings) says.

        Raises UserError for the state of an older format.
        """
        if (found := self.metadata(step)["format"]) < FORMAT:
            raise UserError(
                f"{self.directory} has training states of format {found}, this code continues "
                f"{FORMAT}: choose another --workdir (the parameters can be read)"
            )
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract.params),
                opt_state=ocp.args.StandardRestore(abstract.opt_state),
            ),
        )
        counter = jax.device_put(jnp.asarray(step, jnp.int32), abstract.step.sharding)
        return TrainState(counter, restored["params"], restored["opt_state"])

    def close(self):
        """Waits for the last save; raises what went wrong in the background."""
        with self._disk_is_the_users():
            try:
                self._manager.wait_until_finished()
            finally:
                self._manager.close()

    @contextlib.contextmanager
    def _disk_is_the_users(self):
        try:
            yield
        except Exception as e:  # TensorStore raises ValueError, Orbax various, the system OSError
            found = re.search(
                r"(RESOURCE_EXHAUSTED|No space left|quota exceeded)|Read-only|Permission denied",
                str(e),
            )
            if not found:
                raise
            what = "no space left for" if found[1] else "no permission to write"
            newest = self._manager.latest_step() or "none"
            raise UserError(
                f"{what} a checkpoint in {self.directory} (newest complete step: {newest}): mend "
                f"that, then the same command continues"
            ) from e


def is_loss(metric: str) -> bool:
    """Whether lower is better."""
    return metric.startswith("heldout/")


def _checked(metadata: dict, path) -> dict:
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
    """Writes a checkpoint of parameters alone into a work directory that has none."""
    item = Path(directory(workdir)) / str(step)
    handler = ocp.CompositeCheckpointHandler(
        params=ocp.StandardCheckpointHandler(), metadata=ocp.JsonCheckpointHandler()
    )
    with ocp.Checkpointer(handler) as writer:
        arguments = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            metadata=ocp.args.JsonSave({"format": FORMAT, "step": step} | metadata),
        )
        writer.save(item, args=arguments)


@contextlib.contextmanager
def _reader(item: Path):
    """An Orbax checkpointer for one checkpoint. Raises UserError where files are cut or missing."""
    handler = ocp.CompositeCheckpointHandler(
        params=ocp.PyTreeCheckpointHandler(),
        opt_state=ocp.PyTreeCheckpointHandler(),  # known, so that Orbax does not warn; not read
        metadata=ocp.JsonCheckpointHandler(),
    )
    try:
        with ocp.Checkpointer(handler) as reader:
            yield reader
    except (ValueError, OSError) as e:
        raise UserError(f"{item} is damaged: {str(e).splitlines()[0][:300]}") from e


def load_params(path, step: int | None = None, parts=None) -> tuple[dict, dict]:
    """(nested parameters as NumPy arrays, metadata) of a work directory's checkpoint.

    step: default the newest. parts: names at the top of the tree, the only ones that are read.
    Needs no devices like those that wrote it, and does not read the optimizer state.
    """
    root, newest = find(path)
    step = newest if step is None else step
    item = Path(root) / str(step)
    with _reader(item) as reader:
        tree = reader.metadata(item).item_metadata["params"].tree
        tree = {name: tree[name] for name in tree if parts is None or name in parts}
        kind = ocp.RestoreArgs(restore_type=np.ndarray)
        arguments = ocp.args.Composite(
            params=ocp.args.PyTreeRestore(
                item=tree,
                restore_args=jax.tree.map(lambda _: kind, tree),
                partial_restore=True,
            ),
            metadata=ocp.args.JsonRestore(),
        )
        found = reader.restore(item, args=arguments)
    return found["params"], _checked(found["metadata"], root)


def describe(path, step: int | None = None) -> list[tuple[str, tuple, str, str, int]]:
    """(name, shape, dtype, sharding as it was written, bytes) of every array; reads no array.

    Names begin with params or opt_state.
    """
    root, newest = find(path)
    item = Path(root) / str(newest if step is None else step)
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
