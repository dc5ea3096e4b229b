"""timm's VisionTransformer: `global_pool` "avg" (fc_norm) or "token" (norm), with or without head.

A directory with model.safetensors and config.json (`timm.create_model("local-dir:DIR")`), or a
weights file with config.json beside it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dgpt_jax.config import ModelConfig
from dgpt_jax.config.model import SIZES
from dgpt_jax.errors import UserError
from dgpt_jax.weights import files, mapping
from dgpt_jax.weights.config_json import check_sizes, class_names
from dgpt_jax.weights.mapping import ArrayEntry, linear, norm
from dgpt_jax.weights.timm_json import (
    activation_of,
    args_of,
    checked_args,
    config_beside,
    expected_sizes,
    heads_of,
)
from dgpt_jax.weights.types import (
    WeightLayout,
    Weights,
    depth_of,
    encoder_model,
    encoder_shapes,
    image_side,
    require_arrays,
)

# timm's models by size at 224 pixels; others are `vit_base_patch16_224` with model_args.
NAMES = {
    "Ti/16": "vit_tiny_patch16_224",
    "S/16": "vit_small_patch16_224",
    "B/16": "vit_base_patch16_224",
    "L/16": "vit_large_patch16_224",
    "L/14": "vit_large_patch14_224",
    "H/14": "vit_huge_patch14_224",
}
POOLS = {"mean": "avg", "cls": "token"}
NORMS = {"mean": "fc_norm", "cls": "norm"}
PREPROCESS = ("mean", "std", "interpolation", "crop_pct", "crop_mode")


def entries(depth: int, pooling: str, *, head: bool) -> list[ArrayEntry]:
    """Table for classifier.Classifier's parameters."""
    table = [ArrayEntry("cls_token", "encoder/cls_token"), ArrayEntry("pos_embed", "pos_embed")]
    table += mapping.patch_embed("patch_embed.proj", "encoder/patch_embed")
    table += mapping.timm_blocks("blocks", "encoder/blocks", depth)
    table += norm(NORMS[pooling], "norm")
    return table + (linear("head", "head") if head else [])


def _table(weights: Weights) -> list[ArrayEntry]:
    return entries(weights.model.depth, str(weights.pooling), head=weights.num_classes > 0)


def pooling_of(state: Mapping[str, np.ndarray], config: Mapping[str, Any], path: Path | str) -> str:
    """Pooling by the norm of a state dict: `fc_norm` or `norm`.

    Raises UserError if its config.json specifies another, as with timm's fc_norm=False.
    """
    poolings = [pooling for pooling, name in NORMS.items() if f"{name}.weight" in state]
    if len(poolings) != 1:
        raise UserError(f"{path}: expected one of fc_norm and norm, found {len(poolings)}")
    (pooling,) = poolings
    expected, args = POOLS[pooling], args_of(config, path)
    if args.get("fc_norm") not in (None, pooling == "mean"):
        raise UserError(
            f"{path}: the arrays have {NORMS[pooling]}, its config.json has fc_norm "
            f"{args['fc_norm']}"
        )
    # fc_norm without global_pool leaves timm's default, "token".
    default = "token" if args.get("fc_norm") is not None else expected
    pool = args.get("global_pool", config.get("global_pool", default))
    if pool != expected:
        raise UserError(
            f"{path}: {NORMS[pooling]} with global_pool {pool}, as its config.json has it, is not "
            f"supported"
        )
    return pooling


def model_of(
    state: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    heads: int | None,
    path: Path | str,
) -> ModelConfig:
    """The `config.Model` of a state dict and its config.json. Raises UserError."""
    names = ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight")
    kernel, positions, hidden = require_arrays(state, names, path)
    width, _, patch, _ = kernel.shape
    args, origin = checked_args(config, path)
    model = encoder_model(
        width=width,
        patch=patch,
        heads=heads_of(config, width, heads, path),
        depth=depth_of(state, "blocks.", path),
        mlp_width=len(hidden),
        image_size=image_side(positions.shape[1], patch, path),
        activation=activation_of(args, origin),
    )
    expected = expected_sizes(args, patch, origin)
    check_sizes(expected, vars(model) | {"grid": model.grid}, path)
    return model


def read(
    state: Mapping[str, np.ndarray],
    path: Path,
    heads: int | None = None,
    decoder_heads: int | None = None,
) -> Weights:
    """Weights from a state dict and the config.json beside its file. Raises UserError."""
    config, preprocess, notes = config_beside(path)
    model, pooling = model_of(state, config, heads, path), pooling_of(state, config, path)
    classes = len(state["head.bias"]) if "head.bias" in state else 0
    table = entries(model.depth, pooling, head=classes > 0)
    params = mapping.read(table, state, encoder_shapes(model, pooling, classes), what=str(path))
    labels = config.get("label_names") or (config.get("pretrained_cfg") or {}).get("label_names")
    names = class_names(labels, classes, f"{path}: label_names of its config.json")
    return Weights(model, params, pooling, str(path), preprocess, notes=notes, classes=names)


def config_json(weights: Weights) -> dict[str, Any]:
    """Content of timm's config.json: architecture, arguments and preprocessing."""
    model, classes = weights.model, weights.num_classes
    shape = (model.width, model.depth, model.heads, model.patch)
    size = next((size for size in NAMES if SIZES[size] == shape), "B/16")
    pool = POOLS[str(weights.pooling)]
    return {
        "architecture": NAMES[size],
        "num_classes": classes,
        **({"label_names": list(weights.classes)} if weights.classes else {}),
        "num_features": model.width,
        "global_pool": pool,
        "model_args": {
            "img_size": model.image_size,
            "patch_size": model.patch,
            "embed_dim": model.width,
            "depth": model.depth,
            "num_heads": model.heads,
            "mlp_ratio": model.mlp_ratio,
            "num_classes": classes,
            "global_pool": pool,
            "act_layer": model.activation,
        },
        "pretrained_cfg": {
            "input_size": [3, model.image_size, model.image_size],
            "fixed_input_size": True,
            **{n: getattr(weights.preprocess, n) for n in PREPROCESS},
            "num_classes": classes,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def save(weights: Weights, path: Path) -> None:
    """Writes model.safetensors and config.json. Raises UserError."""
    if weights.model.eps != 1e-6:
        raise UserError(
            f"timm's ViT has LayerNorm eps 1e-6, these weights {weights.model.eps}: --eps=1e-6 "
            f"changes it"
        )
    state = mapping.write(_table(weights), weights.params)
    files.write_safetensors(path / "model.safetensors", state, {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config_json(weights), indent=1) + "\n")


LAYOUT = WeightLayout(
    "timm",
    detect=lambda state, path: state is not None and "patch_embed.proj.weight" in state,
    read=read,
    table=_table,
    save=save,
)
