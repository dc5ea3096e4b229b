"""Our own two layouts: a checkpoint directory, and one safetensors file that tells what it holds.

Names in the file are the paths of the parameters; its metadata has, under "dgpt_jax", JSON with the
model, the pooling, the preprocessing and where the weights come from.
"""

import dataclasses
import json
from pathlib import Path

from dgpt_jax import checkpoint
from dgpt_jax.config import Model
from dgpt_jax.convert import files, layout
from dgpt_jax.convert.layout import Entry
from dgpt_jax.convert.weights import DECODERS, Layout, Preprocess, Weights, crop_pct
from dgpt_jax.schema import UserError, parse

KEY = "dgpt_jax"
FORMAT = 1


def table(weights: Weights) -> list[Entry]:
    """Every parameter by its own name."""
    return [Entry(path, path) for path in sorted(weights.params)]


def _about(weights: Weights) -> dict:
    """What the parameters alone do not tell, as JSON."""
    return {
        "format": FORMAT,
        "model": dataclasses.asdict(weights.model),
        "pooling": weights.pooling,
        "preprocess": dataclasses.asdict(weights.preprocess),
        "source": weights.source,
        "run": dict(weights.run),
        "classes": list(weights.classes),
    }


def _weights(params, about: dict, source: str, *, part: bool = False) -> Weights:
    """Weights of flat parameters, every one of them checked unless they are a part of all."""
    if about["format"] > FORMAT:
        raise UserError(f"{source} has format {about['format']}, this code reads {FORMAT}")
    how = Preprocess.of(about["preprocess"])
    model = parse(Model, about["model"])
    weights = Weights(
        model, params, about["pooling"], source, how, about.get("run", {}),
        classes=tuple(about.get("classes", ())),
    )  # fmt: skip
    if weights.full and part:
        return weights
    if weights.full and not any(f"{name}/pred/kernel" in params for name in DECODERS):
        raise UserError(f"{source} holds neither a decoder nor a final norm")
    params = layout.read(table(weights), params, weights.shapes(), what=source)
    return dataclasses.replace(weights, params=params)


def read_file(state, path: Path, heads=None, decoder_heads=None) -> Weights:
    """Weights from the file."""
    return _weights(state, json.loads(files.read_metadata(path)[KEY]), str(path))


def save_file(weights: Weights, path: Path):
    """Writes the file."""
    state = layout.write(table(weights), weights.params)
    files.write_safetensors(path, state, {KEY: json.dumps(_about(weights))})


def is_checkpoint(path: Path) -> bool:
    """Whether a directory is one of a work directory's checkpoints."""
    named = path.parent.name == "checkpoints" and path.name.isdigit()
    return named and (path / "params").is_dir()


def read_directory(state, path: Path, heads=None, decoder_heads=None, parts=None) -> Weights:
    """Weights of the newest checkpoint, or of path's own; `parts` as in checkpoint.load_params."""
    step = None
    if is_checkpoint(path):
        step, path = int(path.name), path.parent.parent
    params, metadata = checkpoint.load_params(path, step, parts=parts)
    about = metadata.get(KEY)
    source = f"{path}, step {metadata['step']}"
    if about:
        return _weights(layout.flatten(params), about, source, part=parts is not None)
    model = parse(Model, metadata["config"]["model"])
    config = metadata["config"]
    run = {"config": config, "step": metadata["step"], "directory": str(path)}
    pooling, how, classes = None, Preprocess(), ()
    if config.get("task") == "classify":
        told = config["classify"]
        if told["train"] == "head" and told.get("head", "linear") != "linear":
            raise UserError(
                f"{source} holds a grid of heads ({told['head']}) and no encoder: that is "
                f"{told['weights']}"
            )
        pooling = told["pooling"]
        classes = tuple((metadata.get("data") or {}).get("classes") or ())
        if told.get("resize"):  # what the run was measured with
            how = Preprocess(crop_pct=crop_pct(model.image_size, told["resize"]))
        elif model.image_size > 224:
            how = Preprocess(crop_pct=1.0)
    return Weights(model, layout.flatten(params), pooling, source, how, run=run, classes=classes)


def save_directory(weights: Weights, path: Path):
    """Writes path/checkpoints/STEP."""
    config = {"model": dataclasses.asdict(weights.model)}
    metadata = {"config": weights.run.get("config", config), KEY: _about(weights)}
    step = weights.run.get("step", 0)
    params = layout.write(table(weights), weights.params)
    checkpoint.save_params(path, step, layout.unflatten(params), metadata)


DIRECTORY = Layout(
    "flax",
    found=lambda state, path: state is None,
    read=read_directory,
    table=table,
    save=save_directory,
    full=True,
)
FILE = Layout(
    "safetensors",
    found=lambda state, path: state is not None and KEY in files.read_metadata(path),
    read=read_file,
    table=table,
    save=save_file,
    suffixes=(".safetensors",),
    full=True,
)
