"""DINOv2 towers, with and without registers, as published by Hugging Face.

The teacher's tokens are `last_hidden_state`: CLS and patches after the final norm, without
registers.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from dgpt_jax.weights import hf_json, mean_std, positions
from dgpt_jax.weights.mapping import ArrayEntry, linear, norm, patch_embed
from dgpt_jax.weights.source import Source, strip_prefix

# Of models that have a head beside the tower.
PREFIXES = ("dinov2.", "dinov2_with_registers.")
# {model_type: default eps} of Hugging Face's models with these names.
TYPES = {"dinov2": 1e-6, "dinov2_with_registers": 1e-6}
REGISTERS = "embeddings.register_tokens"


def entries(depth: int, *, registers: bool, swiglu: bool) -> list[ArrayEntry]:
    """Table by the names of a Dinov2Model or Dinov2WithRegistersModel."""
    table = patch_embed("embeddings.patch_embeddings.projection", "patch_embed")
    table.append(ArrayEntry("embeddings.cls_token", "class_embedding"))
    table.append(ArrayEntry("embeddings.position_embeddings", "positions"))
    if registers:
        table.append(ArrayEntry(REGISTERS, "registers"))
    table += norm("layernorm", "ln_post")
    fc1, fc2 = ("weights_in", "weights_out") if swiglu else ("fc1", "fc2")
    for i in range(depth):
        block = f"encoder.layer.{i}"
        for n in (1, 2):
            table += norm(f"{block}.norm{n}", f"blocks/norm{n}", layer=i)
            table.append(ArrayEntry(f"{block}.layer_scale{n}.lambda1", f"blocks/ls{n}", layer=i))
        for j, name in enumerate(("query", "key", "value")):
            name = f"{block}.attention.attention.{name}"
            table += linear(name, "blocks/attn/qkv", layer=i, part=j)
        table += linear(f"{block}.attention.output.dense", "blocks/attn/proj", layer=i)
        table += linear(f"{block}.mlp.{fc1}", "blocks/mlp/fc1", layer=i)
        table += linear(f"{block}.mlp.{fc2}", "blocks/mlp/fc2", layer=i)
    return table


def source(state: Mapping[str, np.ndarray], path: Path) -> Source | None:
    """Tower of a Dinov2Model, or of a model that contains one; None for other arrays."""
    vision = strip_prefix(state, *PREFIXES) or dict(state)
    if not any(".attention.attention." in n for n in vision) or not any(
        ".layer_scale" in n for n in vision
    ):
        return None
    vision.pop("embeddings.mask_token", None)  # of its own pretraining
    registers = vision[REGISTERS].shape[-2] if REGISTERS in vision else 0
    swiglu = any(".mlp.weights_in." in name for name in vision)
    settings, expected = hf_json.config(path.parent, TYPES, activation="gelu")
    if swiglu:
        settings["activation"] = "swiglu"  # hidden_act is unused then
    return Source(
        vision,
        partial(entries, registers=bool(registers), swiglu=swiglu),
        defaults={
            "activation": "gelu",
            "eps": 1e-6,
            "registers": registers,
            "pre_norm": False,
            "patch_bias": True,
            "layer_scale": True,
        },
        settings=settings | mean_std.read(path.parent),
        expected=expected,
        resize=positions.bicubic_antialiased if registers else positions.bicubic,
    )
