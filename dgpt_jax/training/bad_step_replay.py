"""Dumps a step with non-finite numbers to disk, and replays it on one device.

WORKDIR/bad_step_N/ holds step.json (config, targets, losses per example, norms per layer),
params.safetensors and, per process, batch_P.npz with its rows of the batch as they were loaded.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from dgpt_jax.config import TrainConfig, renamed_keys, schema
from dgpt_jax.distributed import sharding
from dgpt_jax.errors import UserError
from dgpt_jax.storage import atomic, gcs, remote_sync
from dgpt_jax.training import tasks
from dgpt_jax.training.bad_step_measurement import measure
from dgpt_jax.training.tasks.base import Task
from dgpt_jax.weights import files, mapping


def write(
    workdir: epath.Path | Path | str,
    task: Task,
    params: Any,
    number: int,
    ids: list[str],
    local: Mapping[str, np.ndarray],
    mesh: jax.sharding.Mesh,
) -> epath.Path:
    """Dumps step `number` and returns the directory. Every process calls it.

    params: before the step. ids, local: example ids and host arrays of this process's rows of its
    batch. Raises UserError if the directory is not writable.
    """
    config, process = task.config, jax.process_index()
    microbatches = _microbatches(config, mesh)
    measured = measure(task, params, number, local, mesh, microbatches=microbatches)
    host_params = _gather_to_first_process(params, mesh)
    rows = sharding.process_rows(mesh, config.batch_size)
    directory = epath.Path(workdir) / f"bad_step_{number:06d}"
    with remote_sync.output_directory(directory) as staging:
        arrays: dict[str, Any] = {"ids": np.array(ids), "rows": rows, **local}
        np.savez(staging / f"batch_{process:04d}.npz", **arrays)
        if process == 0:
            files.write_safetensors(staging / "params.safetensors", host_params, {})
            metadata = {"step": number, "config": schema.to_dict(config)} | task.replay_metadata()
            metadata["batch_shards"] = sharding.batch_shards(mesh)
            text = json.dumps(metadata | measured, indent=1, default=str)
            (staging / "step.json").write_text(text + "\n")
    return directory


def _microbatches(config: TrainConfig, mesh: jax.sharding.Mesh) -> int:
    """The number of micro-batches of the train step, or more where the devices do not divide them:
    there the step pads, here micro-batches are smaller, with at least one row per device."""
    rows = config.batch_size // sharding.batch_shards(mesh)
    return next((n for n in range(config.accum_steps, rows + 1) if rows % n == 0), rows)


def _gather_to_first_process(params: Any, mesh: jax.sharding.Mesh) -> dict[str, np.ndarray]:
    """{path: array} on process 0, {} on others. Devices hold one replicated array at a time."""
    replicate = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))
    arrays = {}
    for name, leaf in mapping.flatten(params).items():
        replicated = replicate(leaf).block_until_ready()
        if jax.process_index() == 0:
            arrays[name] = np.asarray(replicated)
    return arrays


@dataclasses.dataclass(frozen=True)
class Replayed:
    """Results of `measure`: `before` in the run, of the full batch of `batch_size`; `now` of the
    replay, of its `rows` with example ids `ids`."""

    step: int
    batch_size: int
    rows: slice
    ids: list[str]
    before: dict
    now: dict

    def bad_examples(self) -> list[str]:
        """Ids of the examples with a non-finite loss."""
        losses = np.array(list(self.now["losses"].values()))
        return [self.ids[i] for i in np.flatnonzero(~np.isfinite(losses).all(axis=0))]

    def layers(self) -> list[tuple[str, float, float]]:
        """(array and layer, norm of the parameters, norm of the gradient): non-finite ones first,
        then by decreasing gradient norm."""
        layers = []
        for name, norms in self.now["params"].items():
            for layer, (norm, grad) in enumerate(zip(norms, self.now["grads"][name], strict=True)):
                label = f"{name} [{layer}]" if len(norms) > 1 else name
                layers.append((label, norm, grad))
        return sorted(
            layers,
            key=lambda row: (math.isfinite(row[1]), math.isfinite(row[2]), -row[2]),
        )


def replay(
    directory: Path | str, *, dtype: str | None = None, rows: slice | None = None
) -> Replayed:
    """Replays a dumped step on the first local device, with micro-batches of at most the size that
    a device had in the run. The dataset is not needed. Raises UserError.

    dtype: of matrix multiplications; default: the run's. rows: of the batch; default: all.
    """
    if gcs.is_remote(directory):
        raise UserError(f"{directory} is remote: copy it to a local disk")
    directory = Path(directory)
    if not (directory / "step.json").is_file():
        raise UserError(f"{directory} has no step.json: choose a bad_step_… directory of a run")
    metadata = atomic.read_json(directory / "step.json", "bad step")
    config = schema.parse(TrainConfig, renamed_keys.translate(metadata["config"]))
    config = dataclasses.replace(
        config, mesh=dataclasses.replace(config.mesh, data=1, fsdp=1, tensor=1),
        dtype=dtype or config.dtype,
    )  # fmt: skip
    task = tasks.task_from_dump(config, metadata)
    rows = _check_rows(task, rows)
    batch = _read_batch(directory, config.batch_size)
    ids = [str(id_) for id_ in batch.pop("ids")[rows]]
    params = mapping.unflatten(files.read_state(directory / "params.safetensors"))
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    microbatch_size = config.batch_size // config.accum_steps
    if task.independent:
        microbatch_size = max(1, microbatch_size // _batch_shards(directory, metadata))
    now = measure(
        task, params, metadata["step"], batch, mesh, rows=rows,
        microbatches=math.ceil(len(ids) / microbatch_size),
    )  # fmt: skip
    return Replayed(metadata["step"], config.batch_size, rows, ids, metadata, now)


def _check_rows(task: Task, rows: slice | None) -> slice:
    """The rows to replay. Raises UserError if they are out of range, or not the full batch of a
    task whose examples depend on each other."""
    size = task.config.batch_size
    if rows is None:
        return slice(0, size)
    if not 0 <= rows.start < rows.stop <= size:
        raise UserError(
            f"rows {rows.start}:{rows.stop} are out of range: choose START:STOP with "
            f"0 <= START < STOP <= {size}"
        )
    if not task.independent and rows != slice(0, size):
        raise UserError(
            f"rows {rows.start}:{rows.stop}: config.classify.head={task.config.classify.head} "
            f"normalizes over all examples of a micro-batch: replay all {size} rows"
        )
    return rows


def _batch_shards(directory: Path, metadata: dict) -> int:
    """Devices that the batch was split over, or for old dumps a lower bound."""
    return metadata.get("batch_shards") or len(list(directory.glob("batch_*.npz")))


def _read_batch(directory: Path, size: int) -> dict[str, np.ndarray]:
    """The full batch, read array by array. In old dumps without `rows` files are in order. Rows are
    in several files where a mesh splits layers across processes."""
    batch: dict[str, np.ndarray] = {}
    end = 0
    for path in sorted(directory.glob("batch_*.npz")):
        with np.load(path, allow_pickle=False) as arrays:
            count = len(arrays["ids"])
            rows = arrays["rows"] if "rows" in arrays else np.arange(end, end + count)
            for name in arrays.keys() - {"rows"}:
                values = arrays[name]
                batch.setdefault(name, np.empty((size, *values.shape[1:]), values.dtype))
                batch[name][rows] = values
        end += count
    return batch
