"""big_vision's ViT (`models/vit.py`) with pool_type "tok", as .npz of its parameters.

CLS has no position there: ours is added to the token itself. Its GELU is the tanh form.
"""

import math
from pathlib import Path

import numpy as np

from dgpt_jax.convert import files, layout
from dgpt_jax.convert.layout import Entry
from dgpt_jax.convert.weights import (
    Layout,
    Preprocess,
    Weights,
    encoder_model,
    encoder_shapes,
    needed,
)
from dgpt_jax.schema import UserError

BLOCK = "Transformer/encoderblock_"
# Pictures in [-1, 1].
PREPROCESS = Preprocess(
    mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bilinear", crop_mode="center"
)


def entries(model, *, head: bool) -> list[Entry]:
    """The table for heads.Classifier's parameters with positions of the patches alone."""
    width, heads = model.width, model.heads
    split = (heads, width // heads)
    kernel = (model.patch, model.patch, 3, width)
    table = [
        Entry("cls", "encoder/cls_token"),
        Entry("pos_embedding", "pos_embed", shape=(1, model.grid**2, width)),
        Entry("embedding/kernel", "encoder/patch_embed/kernel", shape=kernel),
        Entry("embedding/bias", "encoder/patch_embed/bias"),
    ]
    same = {"LayerNorm_0": "norm1", "LayerNorm_1": "norm2"}
    mlp = {"MlpBlock_0/Dense_0": "mlp/fc1", "MlpBlock_0/Dense_1": "mlp/fc2"}
    for i in range(model.depth):
        block, ours = f"{BLOCK}{i}", "encoder/blocks"
        for theirs, name in same.items():
            for leaf in ("scale", "bias"):
                table.append(Entry(f"{block}/{theirs}/{leaf}", f"{ours}/{name}/{leaf}", layer=i))
        for theirs, name in mlp.items():
            for leaf in ("kernel", "bias"):
                table.append(Entry(f"{block}/{theirs}/{leaf}", f"{ours}/{name}/{leaf}", layer=i))
        attention = f"{block}/MultiHeadDotProductAttention_0"
        for part, name in enumerate(("query", "key", "value")):
            for leaf, shape in (("kernel", (width, *split)), ("bias", split)):
                path = f"{ours}/attn/qkv/{leaf}"
                name_ = f"{attention}/{name}/{leaf}"
                table.append(Entry(name_, path, layer=i, part=part, shape=shape))
        out = f"{ours}/attn/proj"
        table.append(
            Entry(f"{attention}/out/kernel", f"{out}/kernel", layer=i, shape=(*split, width))
        )
        table.append(Entry(f"{attention}/out/bias", f"{out}/bias", layer=i))
    pairs = [("Transformer/encoder_norm/scale", "norm/scale"),
             ("Transformer/encoder_norm/bias", "norm/bias")]  # fmt: skip
    pairs += [("head/kernel", "head/kernel"), ("head/bias", "head/bias")] if head else []
    return table + [Entry(theirs, ours) for theirs, ours in pairs]


def _table(weights: Weights) -> list[Entry]:
    return entries(weights.model, head=weights.num_classes > 0)


def read(state, path: Path, heads=None, decoder_heads=None) -> Weights:
    """Weights from an .npz, whose names may begin with params/."""
    state = {n.removeprefix("params/"): x for n, x in state.items()}
    if "cls" not in state:
        raise UserError(f"{path}: an encoder here has a CLS token, this big_vision ViT has none")
    attention = f"{BLOCK}0/MultiHeadDotProductAttention_0/query/kernel"
    names = ("embedding/kernel", "pos_embedding", attention, f"{BLOCK}0/MlpBlock_0/Dense_0/bias")
    kernel, positions, query, hidden = needed(state, names, path)
    patch, _, _, width = kernel.shape
    side = math.isqrt(positions.shape[1])
    if side * side != positions.shape[1]:
        raise UserError(f"{path}: {positions.shape[1]} positions are not those of a square grid")
    if heads not in (None, query.shape[1]):
        raise UserError(f"{path}: {heads} heads are given, the weights have {query.shape[1]}")
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
    shapes = encoder_shapes(model, "cls", classes)
    shapes["pos_embed"] = (1, side * side, width)
    params = layout.read(entries(model, head=classes > 0), state, shapes, what=str(path))
    params["pos_embed"] = np.pad(params["pos_embed"], ((0, 0), (1, 0), (0, 0)))
    notes = (f"{path} does not tell its preprocessing: pictures in [-1, 1] are taken",)
    return Weights(model, params, "cls", str(path), PREPROCESS, notes=notes)


def save(weights: Weights, path: Path):
    """Writes the .npz."""
    model = weights.model
    if weights.pooling != "cls":
        raise UserError(
            f"big_vision's ViT with a CLS token reads that token: it cannot hold mean pooling (of "
            f"{weights.source})"
        )
    for name, theirs in (("activation", "gelu_tanh"), ("eps", 1e-6)):
        if getattr(model, name) != theirs:
            raise UserError(
                f"big_vision's ViT has {name} {theirs}, these weights {getattr(model, name)}: "
                f"--{name}={theirs} takes the other one"
            )
    positions = weights.params["pos_embed"]
    params = dict(weights.params)
    params["encoder/cls_token"] = params["encoder/cls_token"] + positions[:, :1]
    params["pos_embed"] = positions[:, 1:]
    state = layout.write(_table(weights), params)
    with files.replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **{f"params/{name}": array for name, array in state.items()})


LAYOUT = Layout(
    "big_vision",
    found=lambda state, path: (
        state is not None and any(n.removeprefix("params/").startswith(BLOCK) for n in state)
    ),
    read=read,
    table=_table,
    save=save,
    suffixes=(".npz",),
)
