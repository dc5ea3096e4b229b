"""timm's config.json beside weights: `model_args`, and the preprocessing in `pretrained_cfg`."""

import re
from collections.abc import Mapping
from pathlib import Path

from dgpt_jax.convert.json_files import (
    count,
    group,
    mean_std,
    read_json,
    refuse_unknown,
    refuse_unusual,
    shown,
)
from dgpt_jax.convert.normalisation import timm_preprocess
from dgpt_jax.convert.weights import Preprocess, assumed
from dgpt_jax.schema import UserError

# Heads by the width that timm's words for sizes stand for, whatever patch and image.
WORDS = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12), "large": (1024, 16),
         "huge": (1280, 16)}  # fmt: skip
# Its words for how pictures are resized and cropped.
WAYS = {
    "interpolation": ("nearest", "bilinear", "bicubic", "lanczos", "hamming", "box"),
    "crop_mode": ("center", "squash", "border"),
}
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")
# What our encoder cannot be, and what timm has where the JSON says nothing.
FIXED = {
    "qkv_bias": True, "qk_norm": False, "class_token": True, "no_embed_class": False,
    "reg_tokens": 0, "pre_norm": False, "init_values": None, "norm_layer": None,
    "pool_include_prefix": False, "pos_embed": "learn", "in_chans": 3, "proj_bias": True,
    "scale_attn_norm": False, "scale_mlp_norm": False, "final_norm": True, "embed_layer": None,
    "embed_norm_layer": None, "block_fn": None, "mlp_layer": None, "attn_layer": None,
}  # fmt: skip
# What the arrays have too, by our names.
CLAIMS = {"embed_dim": "width", "depth": "depth", "patch_size": "patch"}
TAKEN = ("num_heads", "act_layer", "global_pool", "fc_norm", "img_size")
# Read in training, for the shape of arrays and their first values, or at other sizes of pictures.
IGNORED = (
    "mlp_ratio", "num_classes", "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate",
    "attn_drop_rate", "drop_path_rate", "weight_init", "fix_init", "dynamic_img_size",
    "dynamic_img_pad", "strict_img_size",
)  # fmt: skip


def args_of(config: dict, what) -> dict:
    """`model_args` of a config.json. Raises UserError."""
    return group(config, "model_args", f"{what}: its config.json")


def checked_args(config: dict, what) -> tuple[dict, str]:
    """(`model_args`, where they stand). Raises UserError on what no encoder here can have."""
    args, file = args_of(config, what), f"{what}: model_args in its config.json"
    refuse_unknown(args, {*FIXED, *CLAIMS, *TAKEN, *IGNORED}, file)
    refuse_unusual(args, FIXED, file)
    return args, file


def claims_of(args: Mapping, patch: int, file: str) -> dict:
    """Sizes that the arrays have too, for check_claims. Raises UserError."""
    claims = {
        ours: (count(args[name], f"{file}: {name}"), f"{name} in its config.json")
        for name, ours in CLAIMS.items()
        if args.get(name) is not None
    }
    if args.get("img_size") is not None:
        side = count(args["img_size"], f"{file}: img_size") // patch
        claims["grid"] = (side, f"img_size // {patch} in its config.json")
    return claims


def heads_of(config: dict, width: int, given: int | None, what) -> int:
    """From the caller, from model_args, or by the architecture's name."""
    told = args_of(config, what).get("num_heads")
    told = told and count(told, f"{what}: num_heads in its config.json")
    name = re.match(r"(?:vit|deit)_([a-z]+)_patch", config.get("architecture", ""))
    if not told and name and WORDS.get(name[1], (0, 0))[0] == width:
        told = WORDS[name[1]][1]
    if given and told and given != told:
        raise UserError(f"{what}: {given} heads are given, its config.json says {told}")
    if not (given or told):
        raise UserError(
            f"{what}: the head count is neither in the weights nor in a config.json beside them: "
            f"give it with --heads"
        )
    return given or told


def activation_of(args: Mapping, file) -> str:
    """The name of the GELU. Raises UserError."""
    activation = args.get("act_layer") or "gelu"
    if activation not in ACTIVATIONS:
        raise UserError(
            f"{file}: act_layer {shown(activation)} is none of {', '.join(ACTIVATIONS)}"
        )
    return activation


def beside(path: Path) -> tuple[dict, Preprocess, tuple[str, ...]]:
    """(what config.json beside a file tells, its preprocessing, notes). Raises UserError.

    What it does not tell of the preprocessing is timm's default.
    """
    file = path.parent / "config.json"
    config = read_json(file) if file.is_file() else {}
    told = timm_preprocess(config, file)
    channels = mean_std(told, "mean", "std", file)
    rest = {name: told[name] for name in ("crop_pct", *WAYS) if told.get(name) is not None}
    for name, value in rest.items():
        good = value in WAYS[name] if name in WAYS else type(value) in (int, float) and value > 0
        if not good:
            raise UserError(f"{file}: {name} {shown(value)} is not known here")
    unknown = [name for name in ("mean", "std") if name not in channels]
    notes = assumed(path, unknown, "ImageNet's, timm's default,")
    return config, Preprocess(**channels, **rest), notes
