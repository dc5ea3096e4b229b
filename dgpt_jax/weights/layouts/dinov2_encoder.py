"""DINOv2's encoder as one of ours, LayerScale in the projections before it.

By Hugging Face's names (`dinov2` has them), or by those of its own .pth and timm's
(`dinov2/models/vision_transformer.py`). Only in: ours have no LayerScale to split off again.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from dgpt_jax.config import Model
from dgpt_jax.convert import dinov2, layout, timm, timm_json
from dgpt_jax.convert.json_files import check_claims
from dgpt_jax.convert.layout import Entry
from dgpt_jax.convert.weights import (
    Layout,
    Preprocess,
    Weights,
    assumed,
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
# Of DINOv2's own code: heads by width, and what an encoder here has not.
HEADS = {384: 6, 768: 12, 1024: 16}
ODD = {"registers": "reg", "gated MLPs": ".mlp.w12."}


def entries(depth: int) -> list[Entry]:
    """The table for heads.Classifier's parameters and the scales encoder/blocks/ls1 and ls2."""
    return [
        replace(entry, path=OURS.get(entry.path, f"encoder/{entry.path}"))
        for entry in dinov2.entries(depth, registers=False, swiglu=False)
    ]


def own_entries(depth: int) -> list[Entry]:
    """The same parameters by the names of DINOv2's own code."""
    table = timm.entries(depth, "cls", head=False)
    for i in range(depth):
        for name in SCALED:
            table.append(Entry(f"blocks.{i}.{name}.gamma", f"encoder/blocks/{name}", layer=i))
    return table


def read_own(state, path: Path, heads=None, decoder_heads=None) -> Weights:
    """Weights of DINOv2's own .pth, or of timm's model of the same names."""
    state = {name: x for name, x in state.items() if name != "mask_token"}
    odd = [what for what, word in ODD.items() if any(word in name for name in state)]
    if odd:
        raise UserError(f"{path}: an encoder here cannot have the {odd[0]} of this DINOv2")
    config, how, notes = timm_json.beside(path)
    timm.pooling_of(state, config, path)
    told = {n: v for n, v in (config.get("model_args") or {}).items() if n != "init_values"}
    heads = heads or HEADS.get(state["patch_embed.proj.weight"].shape[0])
    model = timm.model_of(state, config | {"model_args": told}, heads, path)
    params = _folded(own_entries(model.depth), state, model, path)
    notes += (f"{path}: LayerScale is folded into the projections before it",)
    return Weights(model, params, "cls", str(path), how, notes=notes)


def _folded(table, state, model: Model, path) -> dict[str, np.ndarray]:
    """heads.Classifier's parameters, with the scales in what stands before them."""
    shapes = encoder_shapes(model, "cls", 0)
    scales = {f"encoder/blocks/{name}": (model.depth, model.width) for name in SCALED}
    params = layout.read(table, state, {**shapes, **scales}, what=str(path))
    for name, projection in SCALED.items():
        scale = params.pop(f"encoder/blocks/{name}")
        params[f"encoder/blocks/{projection}/kernel"] *= scale[:, None, :]
        params[f"encoder/blocks/{projection}/bias"] *= scale
    return params


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
    size = told.get("image_size", model.image_size)
    claims = {**source.claims, "grid": (size // patch, f"image_size // {patch} in its config.json")}
    check_claims(claims, vars(model) | {"registers": 0, "grid": model.grid}, path)
    params = _folded(entries(model.depth), source.state, model, path)
    notes = (f"{path}: LayerScale is folded into the projections before it",)
    if any(name.startswith("classifier.") for name in state):
        notes += (f"{path}: the classifier (of CLS and mean together) is left out",)
    channels = {name: told[name] for name in ("mean", "std") if name in told}
    unknown = [name for name in ("mean", "std") if name not in channels]
    notes += assumed(path, unknown, "ImageNet's, as in DINOv2's own code,")
    return Weights(model, params, "cls", str(path), Preprocess(**channels), notes=notes)


LAYOUT = Layout(
    "dinov2",
    found=lambda state, path: state is not None and dinov2.source(state, path) is not None,
    read=read,
    table=lambda weights: entries(weights.model.depth),
)
OWN = Layout(
    "dinov2_pth",
    found=lambda state, path: state is not None and "blocks.0.ls1.gamma" in state,
    read=read_own,
    table=lambda weights: own_entries(weights.model.depth),
)
