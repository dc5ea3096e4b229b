"""Registry of encoder layouts: detection, reading and output paths."""

import dataclasses
from pathlib import Path
from typing import Any, cast

import numpy as np
from etils import epath

from dgpt_jax.errors import UserError
from dgpt_jax.models import probes
from dgpt_jax.storage import gcs
from dgpt_jax.weights import files, hub, types
from dgpt_jax.weights.layouts import big_vision, digpt, dinov2_encoder, hf, mae, native, timm
from dgpt_jax.weights.mapping import unflatten
from dgpt_jax.weights.source import first_names
from dgpt_jax.weights.types import WeightLayout, Weights

# In the order of detection.
LAYOUTS: dict[str, WeightLayout] = {
    layout.name: layout
    for layout in (
        native.DIRECTORY,
        native.FILE,
        digpt.LAYOUT,
        mae.LAYOUT,
        dinov2_encoder.OWN,
        dinov2_encoder.LAYOUT,
        timm.LAYOUT,
        hf.LAYOUT,
        big_vision.LAYOUT,
    )
}
WRITTEN = tuple(name for name, layout in LAYOUTS.items() if layout.save)
# Files of weights in a directory, in the order of preference.
FILES = (
    "model.safetensors", files.INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json",
    "model.pth", "model.npz",
)  # fmt: skip
# Top-level parameters of a checkpoint that an encoder needs.
ENCODER_PARTS = ("encoder", "pos_embed", "norm", "head", "running_mean", "running_var")


def read(
    path: gcs.AnyPath,
    name: str | None = None,
    *,
    heads: int | None = None,
    decoder_heads: int | None = None,
    encoder_only: bool = False,
) -> tuple[WeightLayout, Weights]:
    """Reads the weights at a path; returns their layout (detected if `name` is None) and them.

    A work directory DIR stands for its newest checkpoint, DIR/checkpoints/STEP for that one,
    hf:ORG/NAME for weights on the Hugging Face hub (hub.fetch).
    encoder_only: skips decoders where that saves memory. Raises UserError.
    """
    gcs.require(path)
    named = hub.fetch(path, FILES) if hub.is_name(path) else None
    path = named.path if named else path
    state, file, notes = _open(cast(Path, epath.Path(path)))  # pathlib's interface, also for gs://
    layout = _layout(state, file, name)
    options: dict[str, Any] = {"heads": heads, "decoder_heads": decoder_heads}
    if state is None and encoder_only:
        options["parts"] = ENCODER_PARTS
    try:
        weights = layout.read(state, file, **options)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as e:
        # Sizes are read off arrays and JSON before they are compared with the table.
        raise UserError(
            f"{path} cannot be read in layout {layout.name}: {type(e).__name__} {e}"
        ) from e
    weights = dataclasses.replace(weights, notes=(*notes, *weights.notes))
    if named:
        weights = dataclasses.replace(weights, source=named.name)
    requested = {"heads": heads, "decoder_heads": decoder_heads if weights.full else None}
    for key, count in requested.items():
        actual = getattr(weights.model, key)
        if count not in (None, actual):
            raise UserError(f"{path} has {key} {actual}, but {key} is set to {count}")
    return layout, _with_encoder(weights) if "running_var" in weights.params else weights


def _with_encoder(probe: Weights) -> Weights:
    """Classifier of a linear probe: the encoder that it was trained on, and its head with the batch
    statistics folded in."""
    path = probe.run["config"]["init"]["weights"]
    _, weights = read(path, encoder_only=True)
    weights = types.encoder(weights, probe.pooling if weights.full else None)
    if weights.pooling != probe.pooling or weights.model.grid != probe.model.grid:
        raise UserError(f"{probe.source}: {path} contains another encoder now")
    head = probes.fold_batch_norm(unflatten(probe.params))
    params = {p: x for p, x in weights.params.items() if not p.startswith("head/")}
    params |= {f"head/{name}": np.asarray(x, np.float32) for name, x in head.items()}
    return dataclasses.replace(probe, params=params)


def _open(path: Path) -> files.Read:
    """Arrays of a weights file; state None for a checkpoint directory."""
    if not path.is_dir():
        if not (path.exists() or files.split(path)[1]):
            raise UserError(f"{path} is neither a work directory with checkpoints nor weights")
        return files.read(path)
    if (path / "checkpoints").is_dir() or native.is_checkpoint(path):
        return files.Read(None, path, ())
    for name in FILES:
        if (path / name).is_file():
            return files.read(path / name)
    if path.name == "checkpoints":
        return files.Read(None, path.parent, ())
    raise UserError(
        f"{path} is neither a work directory with checkpoints nor contains {', '.join(FILES)}"
    )


def _layout(state: dict[str, np.ndarray] | None, file: Path, name: str | None) -> WeightLayout:
    if name is not None:
        layout = LAYOUTS[name]
        if (state is None) != (layout is native.DIRECTORY):
            raise UserError(f"{file} is not in layout {name}")
        return layout
    for layout in LAYOUTS.values():
        if layout.detect(state, file):
            return layout
    if state is not None and any(n.startswith(("visual.", "vision_model.")) for n in state):
        raise UserError(
            f"{file} is a vision tower of CLIP or SigLIP: it can be a teacher "
            f"(--config.teacher.weights), but not an encoder (it has a norm before its blocks, or "
            f"another pooling)"
        )
    names = f": {first_names(state)}" if state else ""
    raise UserError(f"{file} is in none of the layouts {', '.join(LAYOUTS)}{names}")


def target(layout: WeightLayout, path: Path) -> Path:
    """The file to write for a path, or the directory itself. Raises UserError."""
    if not layout.suffixes:
        if path.is_file() or path.suffix in (".safetensors", ".pth", ".npz"):
            raise UserError(f"layout {layout.name} is a directory, but {path} is a file name")
        return path
    if path.suffix in layout.suffixes:
        return path
    if path.suffix in (".safetensors", ".pth", ".npz", ".pt", ".bin"):
        raise UserError(
            f"{path}: layout {layout.name} is written as {' or '.join(layout.suffixes)}"
        )
    return path / f"model{layout.suffixes[0]}"
