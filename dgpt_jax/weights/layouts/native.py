"""The two native layouts: a checkpoint directory, and one self-describing safetensors file.

Names in the file are parameter paths; its metadata has, under "dgpt_jax", JSON with the model, the
pooling, the preprocessing and the origin of the weights.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dgpt_jax.config import ModelConfig, renamed_keys
from dgpt_jax.config.schema import parse
from dgpt_jax.errors import UserError
from dgpt_jax.storage import orbax_checkpoint
from dgpt_jax.weights import files, mapping
from dgpt_jax.weights.mapping import ArrayEntry
from dgpt_jax.weights.types import DECODERS, Preprocess, WeightLayout, Weights, crop_pct

KEY = "dgpt_jax"
FORMAT = 1


def table(weights: Weights) -> list[ArrayEntry]:
    """Identity table."""
    return [ArrayEntry(path, path) for path in sorted(weights.params)]


def _metadata(weights: Weights) -> dict[str, Any]:
    """Everything but the parameters, as JSON."""
    return {
        "format": FORMAT,
        "model": dataclasses.asdict(weights.model),
        "pooling": weights.pooling,
        "preprocess": dataclasses.asdict(weights.preprocess),
        "source": weights.source,
        "run": dict(weights.run),
        "classes": list(weights.classes),
    }


def _weights(
    params: dict[str, np.ndarray], metadata: dict[str, Any], source: str, *, partial: bool = False
) -> Weights:
    """Weights of flat parameters and `_metadata`; all are checked unless only some were read."""
    if metadata["format"] > FORMAT:
        raise UserError(f"{source} has format {metadata['format']}, supported are up to {FORMAT}")
    preprocess = Preprocess.from_json(metadata["preprocess"])
    model = parse(ModelConfig, metadata["model"])
    run = metadata.get("run", {})
    if "config" in run:
        run = run | {"config": renamed_keys.translate(run["config"])}
    weights = Weights(
        model, params, metadata["pooling"], source, preprocess, run,
        classes=tuple(metadata.get("classes", ())),
    )  # fmt: skip
    if weights.full and partial:
        return weights
    if weights.full and not any(f"{name}/pred/kernel" in params for name in DECODERS):
        raise UserError(f"{source} has neither a decoder nor a final norm")
    params = mapping.read(table(weights), params, weights.shapes(), what=source)
    return dataclasses.replace(weights, params=params)


def read_file(
    state: dict[str, np.ndarray],
    path: Path,
    heads: int | None = None,
    decoder_heads: int | None = None,
) -> Weights:
    """Weights of a native safetensors file. Raises UserError."""
    return _weights(state, json.loads(files.read_metadata(path)[KEY]), str(path))


def save_file(weights: Weights, path: Path) -> None:
    """Writes a native safetensors file."""
    state = mapping.write(table(weights), weights.params)
    files.write_safetensors(path, state, {KEY: json.dumps(_metadata(weights))})


def is_checkpoint(path: Path) -> bool:
    """True if a directory is one of a work directory's checkpoints."""
    is_step = path.parent.name == "checkpoints" and path.name.isdigit()
    return is_step and (path / "params").is_dir()


def read_directory(
    state: None,
    path: Path,
    heads: int | None = None,
    decoder_heads: int | None = None,
    parts: Sequence[str] | None = None,
) -> Weights:
    """Weights of a checkpoint, or of a work directory's newest one. Raises UserError.

    parts: top-level parameters to read, all by default (orbax_checkpoint.load_params).
    """
    step = None
    if is_checkpoint(path):
        step, path = int(path.name), path.parent.parent
    params, metadata = orbax_checkpoint.load_params(path, step, names=parts)
    flat = mapping.flatten(params)
    source = f"{path}, step {metadata['step']}"
    if metadata.get(KEY):
        return _weights(flat, metadata[KEY], source, partial=parts is not None)
    config = metadata["config"]
    model = parse(ModelConfig, config["model"])
    # The choice of kernels belongs to the machine, not to the model.
    exported = {key: value for key, value in config.items() if key != "kernels"}
    run = {"config": exported, "step": metadata["step"], "directory": str(path)}
    if metadata.get("init"):
        run["init"] = metadata["init"]
    data = config.get("data") or {}
    channels: dict[str, Any] = {name: tuple(data[name]) for name in ("mean", "std") if name in data}
    pooling, preprocess, classes = None, Preprocess(**channels), ()
    if config.get("task") == "classify":
        cfg = config["classify"]
        if cfg["trainable"] == "head" and cfg.get("head", "linear") != "linear":
            raise UserError(
                f"{source} has a grid of heads ({cfg['head']}) but no encoder: use "
                f"{config['init']['weights']}"
            )
        pooling = cfg["pooling"]
        classes = tuple((metadata.get("data") or {}).get("classes") or ())
        if cfg.get("resize"):  # as in the run's evaluation
            pct = crop_pct(model.image_size, cfg["resize"])
            preprocess = dataclasses.replace(preprocess, crop_pct=pct)
        elif model.image_size > 224:
            preprocess = dataclasses.replace(preprocess, crop_pct=1.0)
    return Weights(model, flat, pooling, source, preprocess, run=run, classes=classes)


def save_directory(weights: Weights, path: Path) -> None:
    """Writes path/checkpoints/STEP."""
    config = {"model": dataclasses.asdict(weights.model)}
    metadata = {"config": weights.run.get("config", config), KEY: _metadata(weights)}
    step = weights.run.get("step", 0)
    params = mapping.write(table(weights), weights.params)
    orbax_checkpoint.save_params(path, step, mapping.unflatten(params), metadata)


DIRECTORY = WeightLayout(
    "flax",
    detect=lambda state, path: state is None,
    read=read_directory,
    table=table,
    save=save_directory,
    full=True,
)
FILE = WeightLayout(
    "safetensors",
    detect=lambda state, path: state is not None and KEY in files.read_metadata(path),
    read=read_file,
    table=table,
    save=save_file,
    suffixes=(".safetensors",),
    full=True,
)
