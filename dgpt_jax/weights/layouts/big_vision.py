"""big_vision's ViT (`models/vit.py`) with pool_type "tok", as .npz of its parameters.

CLS has no position there: ours is added to the token itself. Its GELU is the tanh form. Of its
other pool_types, `gap` and `map` have no CLS token, so that no encoder here can be one of them.

Read are stacked blocks (`scan`) and the names of before 2022 too, which AugReg's files have; their
CLS has a position.
"""

import math
from collections.abc import Mapping
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
# Names of before 2022, by what `fix_old_checkpoints` there makes of them.
OLDER = {
    "Transformer/posembed_input/pos_embedding": "pos_embedding",
    "Transformer/pos_embedding": "pos_embedding",
    "/MultiHeadDotProductAttention_1/": "/MultiHeadDotProductAttention_0/",
    "/LayerNorm_2/": "/LayerNorm_1/",
    "/MlpBlock_3/": "/MlpBlock_0/",
}
STACKED = "Transformer/encoderblock/"
# Where files have the parameters, and the state of their training.
PREFIXES = ("params/", "opt/target/")
TRAINING = ("opt/", "chrono/", "extra/")
# Pictures in [-1, 1].
PREPROCESS = Preprocess(
    mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bilinear", crop_mode="center"
)


def entries(model, *, head: bool, cls_position: bool = False) -> list[Entry]:
    """The table for heads.Classifier's parameters, positions of the patches alone by default."""
    width, heads = model.width, model.heads
    split = (heads, width // heads)
    kernel = (model.patch, model.patch, 3, width)
    table = [
        Entry("cls", "encoder/cls_token"),
        Entry("pos_embedding", "pos_embed", shape=(1, cls_position + model.grid**2, width)),
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


def modern(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters of a file by today's names, blocks one by one."""
    prefix = next((p for p in PREFIXES if any(n.startswith(p) for n in state)), "")
    found = {}
    for name, array in state.items():
        if name.startswith(TRAINING) and not (prefix and name.startswith(prefix)):
            continue
        name = name.removeprefix(prefix)
        for old, new in OLDER.items():
            name = name.replace(old, new)
        if name.startswith(STACKED):
            rest = name.removeprefix(STACKED)
            found |= {f"{BLOCK}{i}/{rest}": layer for i, layer in enumerate(array)}
        else:
            found[name] = array
    return found


def _table(weights: Weights) -> list[Entry]:
    return entries(weights.model, head=weights.num_classes > 0)


def read(state, path: Path, heads=None, decoder_heads=None) -> Weights:
    """Weights from an .npz."""
    state = modern(state)
    if "cls" not in state:
        kind = "map" if any(name.startswith("MAPHead_0/") for name in state) else "gap"
        raise UserError(
            f"{path}: an encoder here has a CLS token, a big_vision ViT with pool_type {kind} has "
            f"none"
        )
    attention = f"{BLOCK}0/MultiHeadDotProductAttention_0/query/kernel"
    names = ("embedding/kernel", "pos_embedding", attention, f"{BLOCK}0/MlpBlock_0/Dense_0/bias")
    kernel, positions, query, hidden = needed(state, names, path)
    patch, _, _, width = kernel.shape
    side = math.isqrt(positions.shape[1])
    cls_position = positions.shape[1] - side * side
    if cls_position > 1:
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
    shapes = {**encoder_shapes(model, "cls", classes), "pos_embed": (1, positions.shape[1], width)}
    table = entries(model, head=classes > 0, cls_position=cls_position == 1)
    params = layout.read(table, state, shapes, what=str(path))
    if not cls_position:
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
    found=lambda state, path: state is not None and any(n.startswith(BLOCK) for n in modern(state)),
    read=read,
    table=_table,
    save=save,
    suffixes=(".npz",),
)
