"""DINOv2's encoder, with LayerScale folded into the preceding projections.

By Hugging Face's names (dinov2.py), or by those of its own .pth and of timm
(`dinov2/models/vision_transformer.py`). Read-only, since encoders here have no LayerScale.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from dgpt_jax.config import ModelConfig
from dgpt_jax.errors import MissingHeads, UserError
from dgpt_jax.weights import mapping, timm_json
from dgpt_jax.weights.config_json import check_sizes
from dgpt_jax.weights.layouts import dinov2, timm
from dgpt_jax.weights.mapping import ArrayEntry
from dgpt_jax.weights.types import (
    Preprocess,
    WeightLayout,
    Weights,
    assumption_note,
    depth_of,
    encoder_model,
    encoder_shapes,
    image_side,
    require_arrays,
)

# {path in the teacher's parameters: path in classifier.Classifier's}; others differ in a prefix.
PATHS = {
    "class_embedding": "encoder/cls_token",
    "positions": "pos_embed",
    "ln_post/scale": "norm/scale",
    "ln_post/bias": "norm/bias",
}
# {LayerScale: projection that it is folded into}
SCALED = {"ls1": "attn/proj", "ls2": "mlp/fc2"}
# Of DINOv2's own code: heads by width, and substrings of names of unsupported arrays.
HEADS = {384: 6, 768: 12, 1024: 16}
UNSUPPORTED = {"registers": "reg", "gated MLPs": ".mlp.w12."}


def entries(depth: int) -> list[ArrayEntry]:
    """Table for classifier.Classifier's parameters and the scales encoder/blocks/ls1 and ls2."""
    return [
        replace(entry, path=PATHS.get(entry.path, f"encoder/{entry.path}"))
        for entry in dinov2.entries(depth, registers=False, swiglu=False)
    ]


def own_entries(depth: int) -> list[ArrayEntry]:
    """Table for the same parameters by the names of DINOv2's own code."""
    table = timm.entries(depth, "cls", head=False)
    for i in range(depth):
        for name in SCALED:
            table.append(ArrayEntry(f"blocks.{i}.{name}.gamma", f"encoder/blocks/{name}", layer=i))
    return table


def _unsupported(path: Path, feature: str) -> UserError:
    return UserError(f"{path}: this DINOv2 has {feature}, which encoders here do not support")


def read_own(
    state: Mapping[str, np.ndarray],
    path: Path,
    heads: int | None = None,
    decoder_heads: int | None = None,
) -> Weights:
    """Weights of DINOv2's own .pth, or of timm's model with the same names. Raises UserError."""
    state = {name: x for name, x in state.items() if name != "mask_token"}
    for feature, substring in UNSUPPORTED.items():
        if any(substring in name for name in state):
            raise _unsupported(path, feature)
    config, preprocess, notes = timm_json.config_beside(path)
    timm.pooling_of(state, config, path)
    args = {n: v for n, v in (config.get("model_args") or {}).items() if n != "init_values"}
    heads = heads or HEADS.get(state["patch_embed.proj.weight"].shape[0])
    model = timm.model_of(state, config | {"model_args": args}, heads, path)
    params = _folded(own_entries(model.depth), state, model, path)
    notes += (f"{path}: LayerScale is folded into the preceding projections",)
    return Weights(model, params, "cls", str(path), preprocess, notes=notes)


def _folded(
    table: list[ArrayEntry], state: Mapping[str, np.ndarray], model: ModelConfig, path: Path
) -> dict[str, np.ndarray]:
    """classifier.Classifier's parameters, with the scales folded into the projections."""
    shapes = encoder_shapes(model, "cls", 0)
    scales = {f"encoder/blocks/{name}": (model.depth, model.width) for name in SCALED}
    params = mapping.read(table, state, {**shapes, **scales}, what=str(path))
    for name, projection in SCALED.items():
        scale = params.pop(f"encoder/blocks/{name}")
        params[f"encoder/blocks/{projection}/kernel"] *= scale[:, None, :]
        params[f"encoder/blocks/{projection}/bias"] *= scale
    return params


def read(
    state: Mapping[str, np.ndarray],
    path: Path,
    heads: int | None = None,
    decoder_heads: int | None = None,
) -> Weights:
    """Weights of a Dinov2Model, or of the one in a Dinov2ForImageClassification.

    Raises UserError.
    """
    source = dinov2.source(state, path)
    assert source is not None
    settings = {**source.defaults, **source.settings}
    if settings["registers"] or settings["activation"] == "swiglu":
        raise _unsupported(path, "registers" if settings["registers"] else "gated MLPs")
    if "heads" not in settings and heads is None:
        raise MissingHeads(f"{path}: no config.json beside it has the head count: set --heads")
    if heads not in (None, settings.get("heads", heads)):
        raise UserError(f"{path}: heads is set to {heads}, its config.json has {settings['heads']}")
    names = ("embeddings.patch_embeddings.projection.weight", "embeddings.position_embeddings",
             "encoder.layer.0.mlp.fc1.bias")  # fmt: skip
    kernel, positions, hidden = require_arrays(source.state, names, path)
    width, _, patch, _ = kernel.shape
    model = encoder_model(
        width=width,
        patch=patch,
        heads=heads or settings["heads"],
        depth=depth_of(source.state, "encoder.layer.", path),
        mlp_width=len(hidden),
        image_size=image_side(positions.shape[1], patch, path),
        eps=settings["eps"],
        activation=settings["activation"],
    )
    size = settings.get("image_size", model.image_size)
    grid = (size // patch, f"image_size // {patch} in its config.json")
    actual = vars(model) | {"registers": 0, "grid": model.grid}
    check_sizes({**source.expected, "grid": grid}, actual, path)
    params = _folded(entries(model.depth), source.state, model, path)
    notes = (f"{path}: LayerScale is folded into the preceding projections",)
    if any(name.startswith("classifier.") for name in state):
        notes += (f"{path}: dropped the classifier (of concatenated CLS and mean)",)
    channels = {name: settings[name] for name in ("mean", "std") if name in settings}
    missing = [name for name in ("mean", "std") if name not in channels]
    notes += assumption_note(path, missing, "ImageNet's, as in DINOv2's own code")
    return Weights(model, params, "cls", str(path), Preprocess(**channels), notes=notes)


LAYOUT = WeightLayout(
    "dinov2",
    detect=lambda state, path: state is not None and dinov2.source(state, path) is not None,
    read=read,
    table=lambda weights: entries(weights.model.depth),
)
OWN = WeightLayout(
    "dinov2_pth",
    detect=lambda state, path: state is not None and "blocks.0.ls1.gamma" in state,
    read=read_own,
    table=lambda weights: own_entries(weights.model.depth),
)
