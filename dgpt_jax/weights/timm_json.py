"""Strict reader of timm's config.json: `model_args`, and preprocessing in `pretrained_cfg`."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dgpt_jax.errors import MissingHeads, UserError
from dgpt_jax.weights.config_json import (
    format_value,
    get_object,
    positive_int,
    read_json,
    read_mean_std,
    refuse_unknown_keys,
    require_values,
)
from dgpt_jax.weights.mean_std import timm_preprocess
from dgpt_jax.weights.types import Preprocess, assumption_note

# (width, heads) of timm's size names, whatever patch and image size.
SIZE_NAMES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12), "large": (1024, 16),
              "huge": (1280, 16)}  # fmt: skip
# Values of the preprocessing.
PREPROCESS_VALUES = {
    "interpolation": ("nearest", "bilinear", "bicubic", "lanczos", "hamming", "box"),
    "crop_mode": ("center", "squash", "border"),
}
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")
# Architecture options of which an encoder here has timm's default only.
SUPPORTED_VALUES = {
    "qkv_bias": True, "qk_norm": False, "class_token": True, "no_embed_class": False,
    "reg_tokens": 0, "pre_norm": False, "init_values": None, "norm_layer": None,
    "pool_include_prefix": False, "pos_embed": "learn", "in_chans": 3, "proj_bias": True,
    "scale_attn_norm": False, "scale_mlp_norm": False, "final_norm": True, "embed_layer": None,
    "embed_norm_layer": None, "block_fn": None, "mlp_layer": None, "attn_layer": None,
}  # fmt: skip
# Sizes that the arrays determine too, by our names.
SIZE_KEYS = {"embed_dim": "width", "depth": "depth", "patch_size": "patch"}
READ_KEYS = ("num_heads", "act_layer", "global_pool", "fc_norm", "img_size")
# Read in training, for array shapes and initialization, or at other image sizes.
IGNORED = (
    "mlp_ratio", "num_classes", "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate",
    "attn_drop_rate", "drop_path_rate", "weight_init", "fix_init", "dynamic_img_size",
    "dynamic_img_pad", "strict_img_size",
)  # fmt: skip


def args_of(config: Mapping, path: Path | str) -> dict[str, Any]:
    """`model_args` of the config.json beside `path`. Raises UserError."""
    return get_object(config, "model_args", f"{path}: its config.json")


def checked_args(config: Mapping, path: Path | str) -> tuple[dict[str, Any], str]:
    """(`model_args`, their origin for messages). Raises UserError on unsupported options."""
    args, origin = args_of(config, path), f"{path}: model_args in its config.json"
    refuse_unknown_keys(args, {*SUPPORTED_VALUES, *SIZE_KEYS, *READ_KEYS, *IGNORED}, origin)
    require_values(args, SUPPORTED_VALUES, origin)
    return args, origin


def expected_sizes(args: Mapping, patch: int, origin: str) -> dict[str, tuple[Any, str]]:
    """Sizes in `model_args`, for check_sizes. Raises UserError."""
    expected = {
        name: (positive_int(args[key], f"{origin}: {key}"), f"{key} in its config.json")
        for key, name in SIZE_KEYS.items()
        if args.get(key) is not None
    }
    if args.get("img_size") is not None:
        side = positive_int(args["img_size"], f"{origin}: img_size") // patch
        expected["grid"] = (side, f"img_size // {patch} in its config.json")
    return expected


def heads_of(config: Mapping, width: int, heads: int | None, path: Path | str) -> int:
    """Head count by the caller, model_args or the architecture's name. Raises UserError."""
    stated = args_of(config, path).get("num_heads")
    stated = stated and positive_int(stated, f"{path}: num_heads in its config.json")
    name = re.match(r"(?:vit|deit)_([a-z]+)_patch", config.get("architecture", ""))
    if not stated and name and SIZE_NAMES.get(name[1], (0, 0))[0] == width:
        stated = SIZE_NAMES[name[1]][1]
    if heads and stated and heads != stated:
        raise UserError(f"{path}: heads is set to {heads}, its config.json has {stated}")
    if not (count := heads or stated):
        raise MissingHeads(
            f"{path}: the head count is neither in the weights nor in a config.json beside them: "
            f"set --heads"
        )
    return count


def activation_of(args: Mapping, origin: str) -> str:
    """Name of the GELU. Raises UserError."""
    activation = args.get("act_layer") or "gelu"
    if activation not in ACTIVATIONS:
        raise UserError(
            f"{origin}: act_layer {format_value(activation)} is none of {', '.join(ACTIVATIONS)}"
        )
    return activation


def config_beside(path: Path) -> tuple[dict[str, Any], Preprocess, tuple[str, ...]]:
    """(content of the config.json beside a file, its preprocessing, notes). Raises UserError.

    Preprocessing that it does not specify is timm's default.
    """
    file = path.parent / "config.json"
    config = read_json(file) if file.is_file() else {}
    content = timm_preprocess(config, file)
    channels = read_mean_std(content, "mean", "std", file)
    names = ("crop_pct", *PREPROCESS_VALUES)
    options = {name: content[name] for name in names if content.get(name) is not None}
    for name, value in options.items():
        if name in PREPROCESS_VALUES:
            valid = value in PREPROCESS_VALUES[name]
        else:
            valid = type(value) in (int, float) and value > 0
        if not valid:
            raise UserError(f"{file}: {name} {format_value(value)} is not supported")
    missing = [name for name in ("mean", "std") if name not in channels]
    notes = assumption_note(path, missing, "ImageNet's, timm's default")
    return config, Preprocess(**channels, **options), notes
