"""DINOv2's encoder as one of ours: `dinov2` has its names, LayerScale goes into the projections.

Only in: ours have no LayerScale to split off again.
"""

from dataclasses import replace
from pathlib import Path

from dgpt_jax.convert import dinov2, layout
from dgpt_jax.convert.layout import Entry
from dgpt_jax.convert.weights import (
    Layout,
    Preprocess,
    Weights,
    depth_of,
    encoder_model,
    encoder_shapes,
    image_side,
    needed,
)
from dgpt_jax.schema import UserError

# The tower's parameters, and heads.Classifier's.
OURS = {
    "class_embedding": "encoder/cls_token",
    "positions": "pos_embed",
    "ln_post/scale": "norm/scale",
    "ln_post/bias": "norm/bias",
}
# What a scale is folded into.
SCALED = {"ls1": "attn/proj", "ls2": "mlp/fc2"}


def entries(depth: int) -> list[Entry]:
    """The table for heads.Classifier's parameters and the scales encoder/blocks/ls1 and ls2."""
    return [
        replace(entry, path=OURS.get(entry.path, f"encoder/{entry.path}"))
        for entry in dinov2.entries(depth, registers=False, swiglu=False)
    ]


def read(state, path: Path, heads=None, decoder_heads=None) -> Weights:
    """Weights of a Dinov2Model, or of the one in a Dinov2ForImageClassification."""
    source = dinov2.source(state, path)
    told = {**source.fields, **source.told}
    if told["registers"] or told["activation"] == "swiglu":
        what = "registers" if told["registers"] else "gated MLPs"
        raise UserError(f"{path}: an encoder here cannot have the {what} of this DINOv2")
    if "heads" not in told and heads is None:
        raise UserError(f"{path}: no config.json beside it tells the head count: give --heads")
    if heads not in (None, told.get("heads", heads)):
        raise UserError(f"{path}: {heads} heads are given, its config.json says {told['heads']}")
    names = ("embeddings.patch_embeddings.projection.weight", "embeddings.position_embeddings",
             "encoder.layer.0.mlp.fc1.bias")  # fmt: skip
    kernel, positions, hidden = needed(source.state, names, path)
    width, _, patch, _ = kernel.shape
    model = encoder_model(
        width=width,
        patch=patch,
        heads=heads or told["heads"],
        depth=depth_of(source.state, "encoder.layer.", path),
        mlp_width=len(hidden),
        image_size=image_side(positions.shape[1], patch, path),
        eps=told["eps"],
        activation=told["activation"],
    )
    shapes = encoder_shapes(model, "cls", 0)
    scales = {f"encoder/blocks/{name}": (model.depth, width) for name in SCALED}
    params = layout.read(entries(model.depth), source.state, shapes | scales, what=str(path))
    for name, projection in SCALED.items():
        scale = params.pop(f"encoder/blocks/{name}")
        params[f"encoder/blocks/{projection}/kernel"] *= scale[:, None, :]
        params[f"encoder/blocks/{projection}/bias"] *= scale
    notes = (f"{path}: LayerScale is folded into the projections before it",)
    if any(name.startswith("classifier.") for name in state):
        notes += (f"{path}: the classifier (of CLS and mean together) is left out",)
    preprocess = Preprocess(mean=tuple(told["mean"]), std=tuple(told["std"]))
    return Weights(model, params, "cls", str(path), preprocess, notes=notes)


LAYOUT = Layout(
    "dinov2",
    found=lambda state, path: state is not None and dinov2.source(state, path) is not None,
    read=read,
    table=lambda weights: entries(weights.model.depth),
)
