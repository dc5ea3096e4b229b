"""DINOv2 towers, with and without registers, as Hugging Face publishes them.

The teacher's tokens are `last_hidden_state`, CLS and patches after the final norm, without the
registers.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from dgpt_jax.convert import hugging_face, normalisation
from dgpt_jax.convert.layout import Entry, linear, norm, patch_embed
from dgpt_jax.convert.source import Source, part

# Of the models that hold a tower beside a head.
PREFIXES = ("dinov2.", "dinov2_with_registers.")
# `model_type` of Hugging Face's models of these names, and the eps that their configs leave out.
TYPES = {"dinov2": 1e-6, "dinov2_with_registers": 1e-6}
REGISTERS = "embeddings.register_tokens"


def entries(depth: int, *, registers: bool, swiglu: bool) -> list[Entry]:
    """The names of a Dinov2Model, or of a Dinov2WithRegistersModel."""
    table = patch_embed("embeddings.patch_embeddings.projection", "patch_embed")
    table.append(Entry("embeddings.cls_token", "class_embedding"))
    table.append(Entry("embeddings.position_embeddings", "positions"))
    if registers:
        table.append(Entry(REGISTERS, "registers"))
    table += norm("layernorm", "ln_post")
    fc1, fc2 = ("weights_in", "weights_out") if swiglu else ("fc1", "fc2")
    for i in range(depth):
        block = f"encoder.layer.{i}"
        for n in (1, 2):
            table += norm(f"{block}.norm{n}", f"blocks/norm{n}", layer=i)
            table.append(Entry(f"{block}.layer_scale{n}.lambda1", f"blocks/ls{n}", layer=i))
        for j, name in enumerate(("query", "key", "value")):
            name = f"{block}.attention.attention.{name}"
            table += linear(name, "blocks/attn/qkv", layer=i, part=j)
        table += linear(f"{block}.attention.output.dense", "blocks/attn/proj", layer=i)
        table += linear(f"{block}.mlp.{fc1}", "blocks/mlp/fc1", layer=i)
        table += linear(f"{block}.mlp.{fc2}", "blocks/mlp/fc2", layer=i)
    return table


def source(state: Mapping, path: Path) -> Source | None:
    """The tower of a Dinov2Model or of a model that holds one; None where there is none."""
    vision = part(state, *PREFIXES) or dict(state)
    if not any(n.startswith("encoder.layer.") and ".layer_scale" in n for n in vision):
        return None
    vision.pop("embeddings.mask_token", None)  # for its own pretraining
    registers = vision[REGISTERS].shape[-2] if REGISTERS in vision else 0
    swiglu = any(".mlp.weights_in." in name for name in vision)
    told, claims = hugging_face.config(path.parent, TYPES, activation="gelu")
    if swiglu:
        told["activation"] = "swiglu"  # hidden_act is then without meaning
    return Source(
        vision,
        partial(entries, registers=bool(registers), swiglu=swiglu),
        fields={
            "activation": "gelu",
            "eps": 1e-6,
            "registers": registers,
            "pre_norm": False,
            "patch_bias": True,
            "layer_scale": True,
        },
        told=told | normalisation.told(path.parent),
        claims=claims,
        antialias=bool(registers),
    )
