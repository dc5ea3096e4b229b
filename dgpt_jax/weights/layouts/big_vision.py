"""big_vision's ViT (`models/vit.py`) with pool_type "tok", as .npz of its parameters.

There CLS has no position: ours is added to the token itself. The GELU is the tanh form. ViTs with
pool_type `gap` or `map` have no CLS token and cannot be encoders here.

Stacked blocks (`scan`) and the names from before 2022 can be read too; the latter are those of
AugReg's files, in which CLS has a position.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dgpt_jax.config import ModelConfig
from dgpt_jax.errors import UserError
from dgpt_jax.weights import files, mapping
from dgpt_jax.weights.mapping import ArrayEntry
from dgpt_jax.weights.types import (
    Preprocess,
    WeightLayout,
    Weights,
    encoder_model,
    encoder_shapes,
    require_arrays,
)

BLOCK = "Transformer/encoderblock_"
# Names from before 2022 and their replacements by `fix_old_checkpoints` there.
RENAMED = {
    "Transformer/posembed_input/pos_embedding": "pos_embedding",
    "Transformer/pos_embedding": "pos_embedding",
    "/MultiHeadDotProductAttention_1/": "/MultiHeadDotProductAttention_0/",
    "/LayerNorm_2/": "/LayerNorm_1/",
    "/MlpBlock_3/": "/MlpBlock_0/",
}
STACKED = "Transformer/encoderblock/"
# Prefixes of the parameters, and of the training state.
PREFIXES = ("params/", "opt/target/")
TRAINING = ("opt/", "chrono/", "extra/")
# Images in [-1, 1].
PREPROCESS = Preprocess(
    mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bilinear", crop_mode="center"
)


def entries(model: ModelConfig, *, head: bool, cls_position: bool = False) -> list[ArrayEntry]:
    """Table for classifier.Classifier's parameters, by default without a position of CLS."""
    width, heads = model.width, model.heads
    split = (heads, width // heads)
    kernel = (model.patch, model.patch, 3, width)
    table = [
        ArrayEntry("cls", "encoder/cls_token"),
        ArrayEntry("pos_embedding", "pos_embed", shape=(1, cls_position + model.grid**2, width)),
        ArrayEntry("embedding/kernel", "encoder/patch_embed/kernel", shape=kernel),
        ArrayEntry("embedding/bias", "encoder/patch_embed/bias"),
    ]
    norms = {"LayerNorm_0": "norm1", "LayerNorm_1": "norm2"}
    mlp = {"MlpBlock_0/Dense_0": "mlp/fc1", "MlpBlock_0/Dense_1": "mlp/fc2"}
    for i in range(model.depth):
        block, native = f"{BLOCK}{i}", "encoder/blocks"
        for pairs, leaves in ((norms, ("scale", "bias")), (mlp, ("kernel", "bias"))):
            for key, name in pairs.items():
                for leaf in leaves:
                    source, path = f"{block}/{key}/{leaf}", f"{native}/{name}/{leaf}"
                    table.append(ArrayEntry(source, path, layer=i))
        attention = f"{block}/MultiHeadDotProductAttention_0"
        for part, name in enumerate(("query", "key", "value")):
            for leaf, shape in (("kernel", (width, *split)), ("bias", split)):
                source, path = f"{attention}/{name}/{leaf}", f"{native}/attn/qkv/{leaf}"
                table.append(ArrayEntry(source, path, layer=i, part=part, shape=shape))
        out = f"{native}/attn/proj"
        table.append(
            ArrayEntry(f"{attention}/out/kernel", f"{out}/kernel", layer=i, shape=(*split, width))
        )
        table.append(ArrayEntry(f"{attention}/out/bias", f"{out}/bias", layer=i))
    pairs = [("Transformer/encoder_norm/scale", "norm/scale"),
             ("Transformer/encoder_norm/bias", "norm/bias")]  # fmt: skip
    pairs += [("head/kernel", "head/kernel"), ("head/bias", "head/bias")] if head else []
    return table + [ArrayEntry(name, path) for name, path in pairs]


def modern(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Parameters of a file by current names, with separate blocks."""
    prefix = next((p for p in PREFIXES if any(n.startswith(p) for n in state)), "")
    params = {}
    for name, array in state.items():
        if name.startswith(TRAINING) and not (prefix and name.startswith(prefix)):
            continue
        name = name.removeprefix(prefix)
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        if name.startswith(STACKED):
            rest = name.removeprefix(STACKED)
            params |= {f"{BLOCK}{i}/{rest}": layer for i, layer in enumerate(array)}
        else:
            params[name] = array
    return params


def _table(weights: Weights) -> list[ArrayEntry]:
    return entries(weights.model, head=weights.num_classes > 0)


def read(
    state: Mapping[str, np.ndarray],
    path: Path,
    heads: int | None = None,
    decoder_heads: int | None = None,
) -> Weights:
    """Weights from an .npz. Raises UserError."""
    state = modern(state)
    if "cls" not in state:
        kind = "map" if any(name.startswith("MAPHead_0/") for name in state) else "gap"
        raise UserError(
            f"{path}: a big_vision ViT with pool_type {kind} has no CLS token, which encoders here "
            f"need"
        )
    attention = f"{BLOCK}0/MultiHeadDotProductAttention_0/query/kernel"
    names = ("embedding/kernel", "pos_embedding", attention, f"{BLOCK}0/MlpBlock_0/Dense_0/bias")
    kernel, positions, query, hidden = require_arrays(state, names, path)
    patch, _, _, width = kernel.shape
    side = math.isqrt(positions.shape[1])
    cls_position = positions.shape[1] - side * side
    if cls_position > 1:
        raise UserError(f"{path}: {positions.shape[1]} positions are not a square grid")
    if heads not in (None, query.shape[1]):
        raise UserError(f"{path}: heads is set to {heads}, the weights have {query.shape[1]}")
    model = encoder_model(
        width=width,
        patch=patch,
        heads=query.shape[1],
        depth=1 + max(int(n[len(BLOCK) :].split("/")[0]) for n in state if n.startswith(BLOCK)),
        mlp_width=hidden.size,
        image_size=patch * side,
        activation="gelu_tanh",
    )
    classes = state["head/bias"].size if "head/bias" in state else 0
    shapes = {**encoder_shapes(model, "cls", classes), "pos_embed": (1, positions.shape[1], width)}
    table = entries(model, head=classes > 0, cls_position=cls_position == 1)
    params = mapping.read(table, state, shapes, what=str(path))
    if not cls_position:
        params["pos_embed"] = np.pad(params["pos_embed"], ((0, 0), (1, 0), (0, 0)))
    notes = (f"{path} does not specify its preprocessing: using images in [-1, 1]",)
    return Weights(model, params, "cls", str(path), PREPROCESS, notes=notes)


def save(weights: Weights, path: Path) -> None:
    """Writes an .npz. Raises UserError."""
    model = weights.model
    if weights.pooling != "cls":
        raise UserError(
            f"big_vision's ViT with a CLS token reads that token and cannot represent mean pooling "
            f"(of {weights.source})"
        )
    for name, required in (("activation", "gelu_tanh"), ("eps", 1e-6)):
        if getattr(model, name) != required:
            raise UserError(
                f"big_vision's ViT has {name} {required}, these weights {getattr(model, name)}: "
                f"--{name}={required} changes it"
            )
    positions = weights.params["pos_embed"]
    params = dict(weights.params)
    params["encoder/cls_token"] = params["encoder/cls_token"] + positions[:, :1]
    params["pos_embed"] = positions[:, 1:]
    state: dict[str, Any] = mapping.write(_table(weights), params)
    with files.replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **{f"params/{name}": array for name, array in state.items()})


LAYOUT = WeightLayout(
    "big_vision",
    detect=lambda state, path: (
        state is not None and any(n.startswith(BLOCK) for n in modern(state))
    ),
    read=read,
    table=_table,
    save=save,
    suffixes=(".npz",),
)
