"""Writes a step whose numbers went bad to disk, and runs it again alone.

WORKDIR/bad_step_N/ holds step.json (config, targets, losses of the examples, norms of every layer),
params.safetensors and, of each process, a batch_P.npz: its rows of the batch as they were loaded.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dgpt_jax import mirror, param_rules, schema, sharding, shards, step, tasks
from dgpt_jax.config import Train
from dgpt_jax.convert import files, layout
from dgpt_jax.schema import UserError


def layer_norms(tree) -> dict[str, list[float]]:
    """L2 norm of every array of a tree by path; of stacked blocks, one a layer."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = param_rules.path_of(path)
        stacked = "blocks/" in name
        axes = tuple(range(int(stacked), leaf.ndim))
        squares = jnp.square(leaf.astype(jnp.float32)).sum(axis=axes)
        found[name] = jnp.sqrt(jnp.atleast_1d(squares))
    return found


def accumulator(task, mesh, params) -> Callable:
    """Jitted (totals, params, frozen, microbatch, weight) → (totals, {decoder: (b,) losses}).

    `totals`: (loss, gradients) in float32, which are donated. `weight` times those of the
    micro-batch are added to them. `params` may be shapes.
    """
    gradient = sharding.on_mesh(jax.value_and_grad(task.loss, has_aux=True), mesh)

    def add(totals, params, frozen, microbatch, weight):
        (loss, parts), grads = gradient(params, frozen, microbatch)
        return jax.tree.map(lambda total, x: total + weight * x, totals, (loss, grads)), parts

    replicated = sharding.replicated(mesh)
    out = (replicated, sharding.shard_state(mesh, params)), replicated
    return jax.jit(add, donate_argnums=0, out_shardings=out)


def measure(task, params, number: int, local, mesh, *, microbatches: int, rows=None) -> dict:
    """{"loss", "losses": {decoder: an example's}, "params", "grads": layer_norms}, plain numbers.

    `local`: host arrays of this process's rows of the batch of step `number`. Only one micro-batch
    at a time lies on the devices, and each takes every `microbatches`-th row, as in the train step.
    Every process of the mesh calls it. `rows`: a slice of the batch, for a single process.
    """
    places, replicated = sharding.shard_state(mesh, params), sharding.replicated(mesh)
    params, frozen = jax.device_put((params, task.frozen), (places, replicated))
    local, size = _prepared(task, number, local, mesh), task.config.batch_size
    if rows is not None:
        local, size = {name: x[rows] for name, x in local.items()}, rows.stop - rows.start
    add, losses = accumulator(task, mesh, params), {}
    totals = jax.jit(
        lambda params: (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)),
        out_shardings=(replicated, places),
    )(params)
    for first in range(microbatches):
        every = slice(first, size, microbatches)
        count = len(range(size)[every])
        microbatch = {name: x[every] for name, x in local.items()}
        microbatch = sharding.global_batch(mesh, count, microbatch)
        totals, parts = add(totals, params, frozen, microbatch, np.float32(count / size))
        for name, values in parts.items():
            losses.setdefault(name, np.empty(size, np.float32))[every] = values
    loss, grads = totals
    norms = jax.jit(lambda *trees: [*map(layer_norms, trees)], out_shardings=replicated)
    measured = dict(zip(("params", "grads"), jax.device_get(norms(params, grads)), strict=True))
    measured |= {"loss": jax.device_get(loss), "losses": losses}
    return jax.tree.map(lambda x: np.asarray(x).tolist(), measured)


def _prepared(task, number: int, local, mesh):
    """This process's rows as `task.loss` gets them, host arrays. Examples may be mixed with others
    of the batch, so the whole batch is prepared at once."""
    if task.prepare is None:
        return local

    def prepare(batch):
        return task.prepare(step.step_key(task.config.seed, number), batch)

    batch = sharding.global_batch(mesh, task.config.batch_size, local)
    batch = jax.jit(prepare, out_shardings=sharding.batch_sharding(mesh))(batch)
    return jax.tree.map(_rows_of_process, batch)


def _rows_of_process(array: jax.Array) -> np.ndarray:
    """The rows of a global batch that this process holds, ascending, each once."""
    parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def write(workdir, task, params, number: int, ids: list[str], local, mesh) -> epath.Path:
    """Writes step `number` to disk, whose batch (this process's rows `local`, examples `ids`) the
    parameters met. Every process calls it; returns the directory."""
    config, process = task.config, jax.process_index()
    microbatches = _microbatches(config, mesh)
    measured = measure(task, params, number, local, mesh, microbatches=microbatches)
    whole = _on_first_process(params, mesh)
    rows = sharding.process_rows(mesh, config.batch_size)
    directory = epath.Path(workdir) / f"bad_step_{number:06d}"
    with mirror.written(directory) as near:
        np.savez(near / f"batch_{process:04d}.npz", ids=np.array(ids), rows=rows, **local)
        if process == 0:
            files.write_safetensors(near / "params.safetensors", whole, {})
            metadata = {"step": number, "config": schema.to_dict(config)} | task.told()
            metadata["batch_shards"] = sharding.batch_shards(mesh)
            text = json.dumps(metadata | measured, indent=1, default=str)
            (near / "step.json").write_text(text + "\n")
    return directory


def _microbatches(config: Train, mesh) -> int:
    """The number of micro-batches of the train step. Where these do not divide by the devices, the
    step pads them; here they are more and smaller, at least one row for each device."""
    rows = config.batch_size // sharding.batch_shards(mesh)
    return next((n for n in range(config.accum_steps, rows + 1) if rows % n == 0), rows)


def _on_first_process(params, mesh) -> dict[str, np.ndarray]:
    """{path: array} on process 0, nothing on others. Devices hold one array whole at a time."""
    replicate = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))
    arrays = {}
    for name, leaf in layout.flatten(params).items():
        whole = replicate(leaf).block_until_ready()
        if jax.process_index() == 0:
            arrays[name] = np.asarray(whole)
    return arrays


@dataclasses.dataclass(frozen=True)
class Replayed:
    """One step run again. `before` and `now` are what `measure` gives: `before` of the whole batch
    in the run, `now` of its `rows`, whose examples are `ids`."""

    step: int
    batch_size: int
    rows: slice
    ids: list[str]
    before: dict
    now: dict

    def bad_examples(self) -> list[str]:
        """Ids of the examples that alone have a loss that is not finite."""
        parts = np.array(list(self.now["losses"].values()))
        return [
            id_ for id_, bad in zip(self.ids, ~np.isfinite(parts).all(axis=0), strict=True) if bad
        ]

    def layers(self) -> list[tuple[str, float, float]]:
        """(array and layer, norm of its parameters, of its gradient), the bad ones first."""
        layers = []
        for name, norms in self.now["params"].items():
            for layer, (norm, grad) in enumerate(zip(norms, self.now["grads"][name], strict=True)):
                label = f"{name} [{layer}]" if len(norms) > 1 else name
                layers.append((label, norm, grad))
        return sorted(
            layers,
            key=lambda row: (math.isfinite(row[1]), math.isfinite(row[2]), -row[2]),
        )


def replay(directory, *, dtype: str | None = None, rows: slice | None = None) -> Replayed:
    """Runs a step again on this machine's first device, without its data, in micro-batches of at
    most what a device had in the run. Raises UserError.

    dtype: of the matmuls, where it should not be the run's. rows: of the batch; default: all.
    """
    if shards.is_remote(directory):
        raise UserError(f"{directory} is read from a local disk: copy it to one")
    directory = Path(directory)
    if not (directory / "step.json").is_file():
        raise UserError(f"{directory} has no step.json: give a bad_step_… directory of a run")
    metadata = json.loads((directory / "step.json").read_text())
    config = schema.parse(Train, metadata["config"])
    config = dataclasses.replace(
        config, mesh=dataclasses.replace(config.mesh, data=1, fsdp=1, tensor=1),
        dtype=dtype or config.dtype,
    )  # fmt: skip
    task = tasks.replayed(config, metadata)
    rows = _rows_of_batch(task, rows)
    batch = _read_batch(directory, config.batch_size)
    ids = [str(id_) for id_ in batch.pop("ids")[rows]]
    params = layout.unflatten(files.read_state(directory / "params.safetensors"))
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    share = config.batch_size // config.accum_steps
    if task.independent:
        share = max(1, share // _batch_shards(directory, metadata))
    now = measure(
        task, params, metadata["step"], batch, mesh, rows=rows,
        microbatches=math.ceil(len(ids) / share),
    )  # fmt: skip
    return Replayed(metadata["step"], config.batch_size, rows, ids, metadata, now)


def _rows_of_batch(task, rows: slice | None) -> slice:
    """The rows to run, checked. Raises UserError."""
    size = task.config.batch_size
    if rows is None:
        return slice(0, size)
    if not 0 <= rows.start < rows.stop <= size:
        raise UserError(
            f"rows {rows.start}:{rows.stop} are not within the batch: choose START:STOP with "
            f"0 <= START < STOP <= {size}"
        )
    if not task.independent and rows != slice(0, size):
        raise UserError(
            f"rows {rows.start}:{rows.stop}: config.classify.head={task.config.classify.head} "
            f"normalises over all examples of a micro-batch: replay all {size} rows"
        )
    return rows


def _batch_shards(directory: Path, metadata: dict) -> int:
    """Devices that the batch was split over; of older directories, at least so many."""
    return metadata.get("batch_shards") or len(list(directory.glob("batch_*.npz")))


def _read_batch(directory: Path, size: int) -> dict[str, np.ndarray]:
    """The whole batch, read array by array. Older files do not name their rows: they follow each
    other. Some rows may be in several files, where a mesh splits a layer between processes."""
    batch: dict[str, np.ndarray] = {}
    end = 0
    for path in sorted(directory.glob("batch_*.npz")):
        with np.load(path, allow_pickle=False) as arrays:
            count = len(arrays["ids"])
            rows = arrays["rows"] if "rows" in arrays else np.arange(end, end + count)
            for name in arrays.keys() - {"rows"}:
                values = arrays[name]
                whole = batch.setdefault(name, np.empty((size, *values.shape[1:]), values.dtype))
                whole[rows] = values
        end += count
    return batch
