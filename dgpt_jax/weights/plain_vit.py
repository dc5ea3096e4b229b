"""Arrays of published vision towers under one set of names, timm's.

Layouts differ in names, in whether q, k and v are one array, in whether a gated MLP's two halves
are one, and in which biases exist. `rename` and `merge` bring them to one form, without a change of
any value; `entries` is the table of that form.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dgpt_jax.errors import UserError
from dgpt_jax.weights.mapping import ArrayEntry
from dgpt_jax.weights.source import Source

# Our path below `blocks` of each array of a block, and its kind.
BLOCK = {
    "norm1.weight": ("norm1/scale", "vector"), "norm1.bias": ("norm1/bias", "vector"),
    "norm2.weight": ("norm2/scale", "vector"), "norm2.bias": ("norm2/bias", "vector"),
    "attn.qkv.weight": ("attn/qkv/kernel", "linear"), "attn.qkv.bias": ("attn/qkv/bias", "vector"),
    "attn.norm.weight": ("attn/norm/scale", "vector"),
    "attn.norm.bias": ("attn/norm/bias", "vector"),
    "attn.proj.weight": ("attn/proj/kernel", "linear"),
    "attn.proj.bias": ("attn/proj/bias", "vector"),
    "ls1.gamma": ("ls1", "vector"), "ls2.gamma": ("ls2", "vector"),
    "mlp.fc1.weight": ("mlp/fc1/kernel", "linear"), "mlp.fc1.bias": ("mlp/fc1/bias", "vector"),
    "mlp.norm.weight": ("mlp/norm/scale", "vector"), "mlp.norm.bias": ("mlp/norm/bias", "vector"),
    "mlp.fc2.weight": ("mlp/fc2/kernel", "linear"), "mlp.fc2.bias": ("mlp/fc2/bias", "vector"),
}  # fmt: skip
TOP = {
    "patch_embed.proj.weight": ("patch_embed/kernel", "conv"),
    "patch_embed.proj.bias": ("patch_embed/bias", "vector"),
    "patch_embed.norm.weight": ("embed_norm/scale", "vector"),
    "cls_token": ("class_embedding", "vector"), "reg_token": ("registers", "same"),
    "pos_embed": ("positions", "same"),
    "norm_pre.weight": ("ln_pre/scale", "vector"), "norm_pre.bias": ("ln_pre/bias", "vector"),
    "norm.weight": ("ln_post/scale", "vector"), "norm.bias": ("ln_post/bias", "vector"),
    "head.weight": ("proj/kernel", "linear"), "head.bias": ("proj/bias", "vector"),
}  # fmt: skip
# Arrays of a block that are stacked, in this order, to one.
PARTS = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "mlp.fc1": ("mlp.gate", "mlp.up")}

State = dict[str, np.ndarray]


def rename(state: Mapping[str, np.ndarray], rules: Iterable[tuple[str, str]]) -> State:
    """Arrays by new names: each (pattern, replacement), in this order, is applied to all names."""
    result = {}
    for name, array in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        result[name] = array
    return result


def drop(state: State, prefixes: tuple[str, ...]) -> None:
    """Removes arrays that the tokens do not depend on."""
    for name in [name for name in state if name.startswith(prefixes)]:
        del state[name]


def merge(state: State) -> None:
    """Stacks the PARTS of all blocks, and adds the biases of matrices that have none, as zeros."""
    for block in sorted({m[1] for name in state if (m := re.match(r"(blocks\.\d+)\.", name))}):
        for whole, parts in PARTS.items():
            names = [f"{block}.{part}" for part in parts]
            weights = [state.pop(f"{n}.weight") for n in names if f"{n}.weight" in state]
            if len(weights) == len(names):
                biases = [
                    state.pop(f"{n}.bias", np.zeros(len(weight), np.float32))
                    for n, weight in zip(names, weights, strict=True)
                ]
                state[f"{block}.{whole}.weight"] = np.concatenate(weights)
                state[f"{block}.{whole}.bias"] = np.concatenate(biases)
        for matrix in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            if f"{block}.{matrix}.weight" in state:
                rows = len(state[f"{block}.{matrix}.weight"])
                state.setdefault(f"{block}.{matrix}.bias", np.zeros(rows, np.float32))


def join_query_value_bias(state: State, attention: str) -> None:
    """Makes the bias of `qkv` from timm's biases of queries and values: keys have none."""
    query, value = (state.pop(f"{attention}.{part}.bias") for part in "qv")
    state[f"{attention}.qkv.bias"] = np.concatenate([query, np.zeros_like(query), value])


def entries(depth: int, *, names: Collection[str]) -> list[ArrayEntry]:
    """Table of the arrays in `names`: names of TOP, and of BLOCK in every block."""
    table = [ArrayEntry(name, *TOP[name]) for name in TOP if name in names]
    for i in range(depth):
        for name, (path, kind) in BLOCK.items():
            if name in names:
                table.append(ArrayEntry(f"blocks.{i}.{name}", f"blocks/{path}", kind, layer=i))
    return table


def source(
    state: State,
    path: Path,
    *,
    gated: bool,
    settings: Mapping[str, Any],
    defaults: Mapping[str, Any],
    **rest: Any,
) -> Source:
    """Source of a tower with these arrays; what they determine is added to its defaults.

    gated: True for MLPs of two halves, whose activation is SwiGLU. rest: fields of Source.
    Raises UserError if the settings have another activation than the arrays.
    """
    merge(state)
    present = {name.split(".", 2)[2] for name in state if name.startswith("blocks.0.")}
    names = (present & BLOCK.keys()) | (state.keys() & TOP.keys())
    stated = settings.get("activation")
    if stated is not None and gated != (stated == "swiglu"):
        raise UserError(
            f"{path}: the JSON beside it has the activation {stated}, the arrays have "
            f"{'gated' if gated else 'ungated'} MLPs"
        )
    determined: dict[str, Any] = {
        "cls": "cls_token" in state,
        "registers": state["reg_token"].shape[-2] if "reg_token" in state else 0,
        "positions": "pos_embed" in state,
        "pre_norm": "norm_pre.weight" in state,
        "post_norm": "norm.weight" in state,
        "embed_norm": "patch_embed.norm.weight" in state,
        "patch_bias": "patch_embed.proj.bias" in state,
        "proj_bias": "head.bias" in state,
        "layer_scale": "ls1.gamma" in names,
        "attn_norm": "attn.norm.weight" in names,
        "mlp_norm": "mlp.norm.weight" in names,
        "norm": "layer" if "norm1.bias" in names else "rms",
    }
    if gated:
        determined["activation"] = "swiglu"
    return Source(
        state,
        partial(entries, names=frozenset(names)),
        defaults={**defaults, **determined},
        settings=settings,
        **rest,
    )


def separate_prefix_positions(state: State) -> None:
    """Gives `pos_embed` the form (1, cls+N, D), N a square number.

    timm's table covers the patches alone, patches and CLS, or registers too: positions that are
    absent become zeros, those of registers are added to them. No output changes.
    """
    table = state["pos_embed"].reshape(-1, state["pos_embed"].shape[-1])
    cls = "cls_token" in state
    count = state["reg_token"].shape[-2] if "reg_token" in state else 0
    for prefix in sorted({0, int(cls), int(cls) + count}):
        side = round((len(table) - prefix) ** 0.5)
        if side**2 == len(table) - prefix:
            break
    else:
        return  # refused by the shape of the table
    if prefix > cls:
        state["reg_token"] = state["reg_token"] + table[int(cls) : prefix]
    elif prefix < cls:
        table = np.concatenate([np.zeros_like(table[:1]), table])
        prefix = 1
    state["pos_embed"] = np.concatenate([table[: int(cls)], table[prefix:]])[None]
