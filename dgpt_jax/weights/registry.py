"""All layouts of encoders: which one lies at a path, reading it, writing another."""

import dataclasses
from pathlib import Path

import numpy as np
from etils import epath

from dgpt_jax import gcs, probe_heads
from dgpt_jax.convert import big_vision, digpt, dinov2_encoder, files, hf, mae, ours, timm, weights
from dgpt_jax.convert.layout import unflatten
from dgpt_jax.convert.source import first_names
from dgpt_jax.convert.weights import Layout, Weights
from dgpt_jax.schema import UserError

# The order in which they are asked whether weights are theirs.
LAYOUTS: dict[str, Layout] = {
    one.name: one
    for one in (
        ours.DIRECTORY,
        ours.FILE,
        digpt.LAYOUT,
        mae.LAYOUT,
        dinov2_encoder.OWN,
        dinov2_encoder.LAYOUT,
        timm.LAYOUT,
        hf.LAYOUT,
        big_vision.LAYOUT,
    )
}
WRITTEN = tuple(name for name, one in LAYOUTS.items() if one.save)
# What a directory of weights may hold.
FILES = (
    "model.safetensors", files.INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json",
    "model.pth", "model.npz",
)  # fmt: skip
# Of a checkpoint, what makes its encoder.
ENCODER_PARTS = ("encoder", "pos_embed", "norm", "head", "running_mean", "running_var")


def read(
    path,
    name: str | None = None,
    *,
    heads: int | None = None,
    decoder_heads: int | None = None,
    encoder_only: bool = False,
) -> tuple[Layout, Weights]:
    """The layout at a path (found, where `name` is None) and the weights. Raises UserError.

    Of a work directory DIR these are its newest checkpoint; DIR/checkpoints/STEP is another.
    encoder_only: decoders are left unread where that spares memory.
    """
    gcs.require(path)
    path = epath.Path(path)
    state, file, notes = _open(path)
    layout = _layout(state, file, name)
    given = {"heads": heads, "decoder_heads": decoder_heads}
    if state is None and encoder_only:
        given["parts"] = ENCODER_PARTS
    try:
        found = layout.read(state, file, **given)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as e:
        # Sizes are taken from arrays and JSON before the table is compared with them.
        raise UserError(
            f"{path} is no weights of layout {layout.name}: {type(e).__name__} {e}"
        ) from e
    found = dataclasses.replace(found, notes=(*notes, *found.notes))
    told = {"heads": heads, "decoder_heads": decoder_heads if found.full else None}
    for name, count in told.items():
        if count not in (None, getattr(found.model, name)):
            raise UserError(f"{path} has {getattr(found.model, name)} {name}, {count} are given")
    return layout, _with_encoder(found) if "running_var" in found.params else found


def _with_encoder(probe: Weights) -> Weights:
    """The classifier of a linear probe: its encoder, where the training had it from, and its head,
    batch statistics folded in."""
    told = probe.run["config"]["classify"]
    _, found = read(told["weights"], encoder_only=True)
    found = weights.encoder(found, probe.pooling if found.full else None)
    if found.pooling != probe.pooling or found.model.grid != probe.model.grid:
        raise UserError(f"{probe.source}: {told['weights']} is another encoder now")
    head = probe_heads.fold(unflatten(probe.params))
    params = {p: x for p, x in found.params.items() if not p.startswith("head/")}
    params |= {f"head/{name}": np.asarray(x, np.float32) for name, x in head.items()}
    return dataclasses.replace(probe, params=params)


def _open(path: Path) -> files.Read:
    """The arrays; with None for them, a checkpoint directory."""
    if not path.is_dir():
        if not (path.exists() or files.split(path)[1]):
            raise UserError(f"{path} is neither a work directory with checkpoints nor weights")
        return files.read(path)
    if (path / "checkpoints").is_dir() or ours.is_checkpoint(path):
        return files.Read(None, path, ())
    for name in FILES:
        if (path / name).is_file():
            return files.read(path / name)
    if path.name == "checkpoints":
        return files.Read(None, path.parent, ())
    raise UserError(
        f"{path} is neither a work directory with checkpoints nor holds {', '.join(FILES)}"
    )


def _layout(state, file: Path, name: str | None) -> Layout:
    if name is not None:
        layout = LAYOUTS[name]
        if (state is None) != (layout is ours.DIRECTORY):
            raise UserError(f"{file} is not of layout {name}")
        return layout
    for layout in LAYOUTS.values():
        if layout.found(state, file):
            return layout
    if state is not None and any(n.startswith(("visual.", "vision_model.")) for n in state):
        raise UserError(
            f"{file} holds a tower of CLIP or SigLIP: a teacher (--config.teacher.weights), which "
            f"an encoder here cannot be (a norm before its blocks, or another pooling)"
        )
    shown = f": {first_names(state)}" if state else ""
    raise UserError(f"{file} is in none of the layouts {', '.join(LAYOUTS)}{shown}")


def target(layout: Layout, path: Path) -> Path:
    """The file that is written for a path, or the directory itself. Raises UserError."""
    if not layout.suffixes:
        if path.is_file() or path.suffix in (".safetensors", ".pth", ".npz"):
            raise UserError(f"layout {layout.name} is a directory, {path} names a file")
        return path
    if path.suffix in layout.suffixes:
        return path
    if path.suffix in (".safetensors", ".pth", ".npz", ".pt", ".bin"):
        raise UserError(f"layout {layout.name} is written as {' or '.join(layout.suffixes)}")
    return path / f"model{layout.suffixes[0]}"
