"""timm's VisionTransformer: `global_pool` "avg" (fc_norm) or "token" (norm), head or not.

A directory with model.safetensors and config.json (`timm.create_model("local-dir:DIR")`), or a file
with the weights, config.json beside it.
"""

import json
from pathlib import Path

from dgpt_jax.convert import files, layout
from dgpt_jax.convert.json_files import check_claims, class_names
from dgpt_jax.convert.layout import Entry, linear, norm
from dgpt_jax.convert.timm_json import (
    activation_of,
    args_of,
    beside,
    checked_args,
    claims_of,
    heads_of,
)
from dgpt_jax.convert.weights import (
    Layout,
    Weights,
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
POOLS = {"mean": "avg", "cls": "token"}
NORMS = {"mean": "fc_norm", "cls": "norm"}
PREPROCESS = ("mean", "std", "interpolation", "crop_pct", "crop_mode")


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
    usual, args = POOLS[found[0]], args_of(config, what)
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


def model_of(state, config: dict, heads: int | None, what) -> Model:
    """The `config.Model` of a state dict and its config JSON."""
    names = ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight")
    kernel, positions, hidden = needed(state, names, what)
    width, _, patch, _ = kernel.shape
    args, file = checked_args(config, what)
    model = encoder_model(
        width=width,
        patch=patch,
        heads=heads_of(config, width, heads, what),
        depth=depth_of(state, "blocks.", what),
        mlp_width=len(hidden),
        image_size=image_side(positions.shape[1], patch, what),
        activation=activation_of(args, file),
    )
    claims = claims_of(args, patch, file)
    check_claims(claims, vars(model) | {"grid": model.grid}, what)
    return model


def read(state, path: Path, heads=None, decoder_heads=None) -> Weights:
    """Weights from a state dict and the config.json beside its file."""
    config, how, notes = beside(path)
    model, pooling = model_of(state, config, heads, path), pooling_of(state, config, path)
    classes = len(state["head.bias"]) if "head.bias" in state else 0
    table = entries(model.depth, pooling, head=classes > 0)
    params = layout.read(table, state, encoder_shapes(model, pooling, classes), what=str(path))
    told = config.get("label_names") or (config.get("pretrained_cfg") or {}).get("label_names")
    names = class_names(told, classes, f"{path}: label_names of its config.json")
    return Weights(model, params, pooling, str(path), how, notes=notes, classes=names)


def config_json(weights: Weights) -> dict:
    """timm's config.json: architecture, arguments, and the preprocessing the encoder expects."""
    model, classes = weights.model, weights.num_classes
    shape = (model.width, model.depth, model.heads, model.patch)
    size = next((size for size in NAMES if SIZES[size] == shape), "B/16")
    pool = POOLS[weights.pooling]
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
