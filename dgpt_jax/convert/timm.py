"""timm's VisionTransformer: `global_pool` "avg" (fc_norm) or "token" (norm), head or not.

A directory with model.safetensors and config.json (`timm.create_model("local-dir:DIR")`), or a file
with the weights, config.json beside it.
"""

import json
import re
from pathlib import Path

from dgpt_jax.convert import files, layout
from dgpt_jax.convert.json_files import (
    check_claims,
    count,
    group,
    mean_std,
    read_json,
    refuse_unknown,
    refuse_unusual,
    shown,
)
from dgpt_jax.convert.layout import Entry, linear, norm
from dgpt_jax.convert.normalisation import timm_preprocess
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
from dgpt_jax.sections import SIZES, Model

# timm's names of sizes at 224 pixels; other models are `vit_base_patch16_224` with model_args.
NAMES = {
    "S/16": "vit_small_patch16_224",
    "B/16": "vit_base_patch16_224",
    "L/16": "vit_large_patch16_224",
    "L/14": "vit_large_patch14_224",
    "H/14": "vit_huge_patch14_224",
}
# Heads by the width that timm's words for sizes stand for, whatever patch and image.
WORDS = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12), "large": (1024, 16),
         "huge": (1280, 16)}  # fmt: skip
POOLS = {"mean": "avg", "cls": "token"}
NORMS = {"mean": "fc_norm", "cls": "norm"}
PREPROCESS = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
# Words for its interpolation and crop_mode.
WAYS = ("nearest", "bilinear", "bicubic", "lanczos", "hamming", "box", "center", "squash", "border")
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


def entries(depth: int, pooling: str, *, head: bool) -> list[Entry]:
    """The table for heads.Classifier's parameters."""
    table = [Entry("cls_token", "encoder/cls_token"), Entry("pos_embed", "pos_embed")]
    table += layout.patch_embed("patch_embed.proj", "encoder/patch_embed")
    table += layout.timm_blocks("blocks", "encoder/blocks", depth)
    table += norm(NORMS[pooling], "norm")
    return table + (linear("head", "head") if head else [])


def _table(weights: Weights) -> list[Entry]:
    return entries(weights.model.depth, weights.pooling, head=weights.num_classes > 0)


def pooling_of(state, config: dict, what) -> str:
    """Which pooling a state dict was made for: it has `fc_norm`, or `norm`.

    Raises UserError where its config.json pools otherwise, as with timm's fc_norm=False.
    """
    found = [pooling for pooling, name in NORMS.items() if f"{name}.weight" in state]
    if len(found) != 1:
        raise UserError(f"{what}: timm's ViT has either fc_norm or norm, this has {len(found)}")
    usual, args = POOLS[found[0]], _args(config, what)
    if args.get("fc_norm") not in (None, found[0] == "mean"):
        raise UserError(
            f"{what}: the arrays have {NORMS[found[0]]}, its config.json fc_norm {args['fc_norm']}"
        )
    # Where nothing tells the pooling, fc_norm alone says nothing of it: timm's default is "token".
    unsaid = "token" if args.get("fc_norm") is not None else usual
    told = args.get("global_pool", config.get("global_pool", unsaid))
    if told != usual:
        raise UserError(
            f"{what}: an encoder here cannot have {NORMS[found[0]]} with global_pool {told}, as "
            f"its config.json says"
        )
    return found[0]


def _args(config: dict, what) -> dict:
    """`model_args` of a config.json. Raises UserError."""
    return group(config, "model_args", f"{what}: its config.json")


def heads_of(config: dict, width: int, given: int | None, what) -> int:
    """From the caller, from model_args, or by the architecture's name."""
    told = _args(config, what).get("num_heads")
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


def model_of(state, config: dict, heads: int | None, what) -> Model:
    """The `config.Model` of a state dict and its config JSON."""
    names = ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight")
    kernel, positions, hidden = needed(state, names, what)
    width, _, patch, _ = kernel.shape
    told, file = _args(config, what), f"{what}: model_args in its config.json"
    refuse_unknown(told, {*FIXED, *CLAIMS, *TAKEN, *IGNORED}, file)
    refuse_unusual(told, FIXED, file)
    model = encoder_model(
        width=width,
        patch=patch,
        heads=heads_of(config, width, heads, what),
        depth=depth_of(state, "blocks.", what),
        mlp_width=len(hidden),
        image_size=image_side(positions.shape[1], patch, what),
        activation=_activation(told, file),
    )
    claims = {
        ours: (count(told[name], f"{file}: {name}"), f"{name} in its config.json")
        for name, ours in CLAIMS.items()
        if told.get(name) is not None
    }
    if told.get("img_size") is not None:
        side = count(told["img_size"], f"{file}: img_size") // patch
        claims["grid"] = (side, f"img_size // {patch} in its config.json")
    check_claims(claims, vars(model) | {"grid": model.grid}, what)
    return model


def _activation(args: dict, file) -> str:
    activation = args.get("act_layer") or "gelu"
    if activation not in ACTIVATIONS:
        raise UserError(
            f"{file}: act_layer {shown(activation)} is none of {', '.join(ACTIVATIONS)}"
        )
    return activation


def read(state, path: Path, heads=None, decoder_heads=None) -> Weights:
    """Weights from a state dict and the config.json beside its file."""
    config, how, notes = beside(path)
    model, pooling = model_of(state, config, heads, path), pooling_of(state, config, path)
    classes = len(state["head.bias"]) if "head.bias" in state else 0
    table = entries(model.depth, pooling, head=classes > 0)
    params = layout.read(table, state, encoder_shapes(model, pooling, classes), what=str(path))
    return Weights(model, params, pooling, str(path), how, notes=notes)


def beside(path: Path) -> tuple[dict, Preprocess, tuple[str, ...]]:
    """(what config.json beside a file tells, its preprocessing, notes). Raises UserError.

    What it does not tell of the preprocessing is timm's default.
    """
    file = path.parent / "config.json"
    config = read_json(file) if file.is_file() else {}
    told = timm_preprocess(config, file)
    channels = mean_std(told, "mean", "std", file)
    rest = {name: told[name] for name in PREPROCESS[2:] if told.get(name) is not None}
    for name, value in rest.items():
        good = type(value) in (int, float) and value > 0 if name == "crop_pct" else value in WAYS
        if not good:
            raise UserError(f"{file}: {name} {shown(value)} is not known here")
    unknown = [name for name in ("mean", "std") if name not in channels]
    notes = assumed(path, unknown, "ImageNet's, timm's default,")
    return config, Preprocess(**channels, **rest), notes


def config_json(weights: Weights) -> dict:
    """timm's config.json: architecture, arguments, and the preprocessing the encoder expects."""
    model, classes = weights.model, weights.num_classes
    shape = (model.width, model.depth, model.heads, model.patch)
    size = next((size for size in NAMES if SIZES[size] == shape), "B/16")
    pool = POOLS[weights.pooling]
    return {
        "architecture": NAMES[size],
        "num_classes": classes,
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


def save(weights: Weights, path: Path):
    """Writes model.safetensors and config.json."""
    if weights.model.eps != 1e-6:
        raise UserError(
            f"timm's ViT has LayerNorms of eps 1e-6, these weights {weights.model.eps}: --eps=1e-6 "
            f"takes the other one"
        )
    state = layout.write(_table(weights), weights.params)
    files.write_safetensors(path / "model.safetensors", state, {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config_json(weights), indent=1) + "\n")


LAYOUT = Layout(
    "timm",
    found=lambda state, path: state is not None and "patch_embed.proj.weight" in state,
    read=read,
    table=_table,
    save=save,
)
