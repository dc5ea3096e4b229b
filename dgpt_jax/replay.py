"""What a run leaves behind when its numbers go bad, and how that step is run again, alone.

WORKDIR/bad_step_N/ holds step.json (config, targets, ids of the batch, norms of every layer),
params.safetensors and, of each process, its rows of the batch with tokens as float32.
"""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

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


def measure(task, params, number: int, batch, mesh) -> dict:
    """{"loss", "losses": {decoder: an example's}, "params", "grads": layer_norms}, plain numbers.

    `batch`: global arrays, of the step `number`. Every process of the mesh calls it.
    """

    def run(params, frozen, batch):
        if task.prepare is not None:
            batch = task.prepare(step.step_key(task.config.seed, number), batch)
        (loss, parts), grads = jax.value_and_grad(task.loss, has_aux=True)(params, frozen, batch)
        return {
            "loss": loss,
            "losses": parts,
            "params": layer_norms(params),
            "grads": layer_norms(grads),
        }

    frozen = jax.device_put(task.frozen, sharding.replicated(mesh))
    measured = jax.jit(sharding.on_mesh(run, mesh), out_shardings=sharding.replicated(mesh))
    return jax.tree.map(
        lambda x: np.asarray(x).tolist(), jax.device_get(measured(params, frozen, batch))
    )


def write(workdir, task, params, number: int, ids: list[str], local, mesh) -> epath.Path:
    """Writes down step `number`, whose batch (this process's rows `local`, examples `ids`) the
    parameters met. Every process calls it; returns the directory."""
    batch = sharding.global_batch(mesh, task.config.batch_size, local)
    measured = measure(task, params, number, batch, mesh)
    tokens = {}
    if "tokens" in local:
        tokens["tokens"] = np.asarray(task.target.codec.decode(local["tokens"]))
    process = jax.process_index()
    whole = params
    if jax.process_count() > 1:
        whole = multihost_utils.process_allgather(params, tiled=True)
    directory = epath.Path(workdir) / f"bad_step_{number:06d}"
    with mirror.written(directory) as near:
        np.savez(near / f"batch_{process:04d}.npz", ids=np.array(ids), **local | tokens)
        if process == 0:
            flat = {name: np.asarray(leaf) for name, leaf in layout.flatten(whole).items()}
            files.write_safetensors(near / "params.safetensors", flat, {})
            told = {"step": number, "config": schema.to_dict(task.config)} | task.told()
            text = json.dumps(told | measured, indent=1, default=str)
            (near / "step.json").write_text(text + "\n")
    return directory


@dataclasses.dataclass(frozen=True)
class Replayed:
    """One step run again: `before` and `now` are what `measure` gives; ids of the examples."""

    step: int
    ids: list[str]
    before: dict
    now: dict

    def bad_examples(self) -> list[str]:
        """Ids of the examples that alone have a loss that is not finite."""
        parts = np.array(list(self.now["losses"].values()))
        return [
            id_ for id_, bad in zip(self.ids, ~np.isfinite(parts).all(axis=0), strict=True) if bad
        ]

    def rows(self) -> list[tuple[str, float, float]]:
        """(array and layer, norm of its parameters, of its gradient), the bad ones first."""
        found = []
        for name, norms in self.now["params"].items():
            for layer, (norm, grad) in enumerate(zip(norms, self.now["grads"][name], strict=True)):
                label = f"{name} [{layer}]" if len(norms) > 1 else name
                found.append((label, norm, grad))
        return sorted(
            found,
            key=lambda row: (math.isfinite(row[1]), math.isfinite(row[2]), -row[2]),
        )


def replay(directory, *, dtype: str | None = None) -> Replayed:
    """Runs a step again on this machine's first device, without its data. Raises UserError.

    dtype: of the matmuls, where it should not be the run's.
    """
    if shards.is_remote(directory):
        raise UserError(f"{directory} is read from a local disk: copy it to one")
    directory = Path(directory)
    if not (directory / "step.json").is_file():
        raise UserError(f"{directory} has no step.json: give a bad_step_… directory of a run")
    told = json.loads((directory / "step.json").read_text())
    config = schema.parse(Train, told["config"])
    config = dataclasses.replace(
        config, mesh=dataclasses.replace(config.mesh, data=1, fsdp=1, tensor=1),
        dtype=dtype or config.dtype,
    )  # fmt: skip
    task = tasks.replayed(config, told)
    pieces = []
    for file in sorted(directory.glob("batch_*.npz")):
        with np.load(file, allow_pickle=False) as piece:
            pieces.append(dict(piece))
    batch = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    ids = [str(id_) for id_ in batch.pop("ids")]
    params = layout.unflatten(files.read_state(directory / "params.safetensors"))
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    return Replayed(told["step"], ids, told, measure(task, params, told["step"], batch, mesh))
