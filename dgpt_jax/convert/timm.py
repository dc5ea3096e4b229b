"""timm's VisionTransformer: `global_pool` "avg" (fc_norm) or "token" (norm), head or not."""

from dgpt_jax import vit
from dgpt_jax.config import SIZES, Model
from dgpt_jax.convert import layout
from dgpt_jax.convert.layout import Entry, linear, norm
from dgpt_jax.schema import UserError, parse

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


def entries(depth: int, pooling: str, *, head: bool) -> list[Entry]:
    """The table for heads.Classifier's parameters."""
    table = [Entry("cls_token", "encoder/cls_token"), Entry("pos_embed", "pos_embed")]
    table += layout.patch_embed("patch_embed.proj", "encoder/patch_embed")
    table += layout.timm_blocks("blocks", "encoder/blocks", depth)
    table += norm(NORMS[pooling], "norm")
    return table + (linear("head", "head") if head else [])


def pooling_of(state) -> str:
    """Which pooling a state dict was made for: it has `fc_norm`, or `norm`."""
    found = [pooling for pooling, name in NORMS.items() if f"{name}.weight" in state]
    if len(found) != 1:
        raise UserError("these are no timm ViT weights: they need either fc_norm or norm")
    return found[0]


def model_of(state, config: dict) -> Model:
    """The `config.Model` of a state dict and its config JSON, which must tell the head count."""
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    heads = (config.get("model_args") or {}).get("num_heads")
    if heads is None:
        sizes = {name: size for size, name in NAMES.items()}
        size = sizes.get(config.get("architecture", ""))
        if size is None:
            raise UserError("the head count is neither in the weights nor in a config.json beside")
        heads = SIZES[size][2]
    return parse(
        Model,
        dict(
            width=width,
            patch=patch,
            heads=heads,
            depth=1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks.")),
            mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / width,
            image_size=patch * round((state["pos_embed"].shape[1] - 1) ** 0.5),
            segments=(1, 1),
        ),
    )


def read(state, depth: int, pooling: str, shapes):
    """Flat Classifier parameters from a timm state dict."""
    table = entries(depth, pooling, head="head.weight" in state)
    return layout.read(table, state, shapes, what="timm weights")


def write(params, depth: int, pooling: str):
    """A timm state dict from flat Classifier parameters."""
    return layout.write(entries(depth, pooling, head="head/kernel" in params), params)


def config_json(model: Model, pooling: str, num_classes: int = 0) -> dict:
    """timm's config.json: architecture, arguments, and the preprocessing the encoder expects."""
    shape = (model.width, model.depth, model.heads, model.patch)
    size = next((size for size in NAMES if SIZES[size] == shape), "B/16")
    return {
        "architecture": NAMES[size],
        "num_classes": num_classes,
        "num_features": model.width,
        "global_pool": POOLS[pooling],
        "model_args": {
            "img_size": model.image_size,
            "patch_size": model.patch,
            "embed_dim": model.width,
            "depth": model.depth,
            "num_heads": model.heads,
            "mlp_ratio": model.mlp_ratio,
            "num_classes": num_classes,
            "global_pool": POOLS[pooling],
        },
        "pretrained_cfg": {
            "input_size": [3, model.image_size, model.image_size],
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "crop_mode": "center",
            "mean": list(vit.IMAGENET_MEAN),
            "std": list(vit.IMAGENET_STD),
            "num_classes": num_classes,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
