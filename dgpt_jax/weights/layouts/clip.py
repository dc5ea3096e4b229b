"""CLIP vision towers as they are published: OpenAI and OpenCLIP (`visual.*`), Hugging Face.

The teacher's tokens are all tokens after `ln_post` and `proj`, CLS first.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dgpt_jax.convert import files, hugging_face, layout, normalisation, open_clip
from dgpt_jax.convert.layout import Entry, hugging_face_layers, linear, norm
from dgpt_jax.convert.source import Source, part, refusal
from dgpt_jax.schema import UserError
from dgpt_jax.towers import CLIP_MEAN, CLIP_STD, Tower

# `model_type` of Hugging Face's models of these names, and the eps that their configs leave out.
KINDS = ("clip", "metaclip_2", "chinese_clip")
TYPES = {f"{kind}{part}": 1e-5 for kind in KINDS for part in ("", "_vision_model")}
# Numbers beside the arrays of OpenAI's own files, which no other program saves. `clip/model.py`
# there has heads of 64 channels and QuickGELU, `clip/clip.py` one mean and std for all models.
OPENAI = ("input_resolution", "context_length", "vocab_size")


def openclip_entries(depth: int) -> list[Entry]:
    """OpenAI's and OpenCLIP's names, after `visual.`."""
    table = [
        Entry("class_embedding", "class_embedding"),
        Entry("positional_embedding", "positions"),
        Entry("conv1.weight", "patch_embed/kernel", "conv"),
        Entry("proj", "proj/kernel"),  # stored (in, out), unlike a Linear
    ]
    table += norm("ln_pre", "ln_pre") + norm("ln_post", "ln_post")
    for i in range(depth):
        block = f"transformer.resblocks.{i}"
        table += norm(f"{block}.ln_1", "blocks/norm1", layer=i)
        table += norm(f"{block}.ln_2", "blocks/norm2", layer=i)
        qkv = "blocks/attn/qkv"
        table.append(Entry(f"{block}.attn.in_proj_weight", f"{qkv}/kernel", "linear", layer=i))
        table.append(Entry(f"{block}.attn.in_proj_bias", f"{qkv}/bias", "vector", layer=i))
        table += linear(f"{block}.attn.out_proj", "blocks/attn/proj", layer=i)
        table += linear(f"{block}.mlp.c_fc", "blocks/mlp/fc1", layer=i)
        table += linear(f"{block}.mlp.c_proj", "blocks/mlp/fc2", layer=i)
    return table


def hf_entries(depth: int) -> list[Entry]:
    """Hugging Face's names (CLIPModel, CLIPVisionModelWithProjection)."""
    table = [
        Entry("vision_model.embeddings.class_embedding", "class_embedding"),
        Entry("vision_model.embeddings.position_embedding.weight", "positions"),
        Entry("vision_model.embeddings.patch_embedding.weight", "patch_embed/kernel", "conv"),
        Entry("visual_projection.weight", "proj/kernel", "linear"),
    ]
    table += norm("vision_model.pre_layrnorm", "ln_pre")  # their spelling
    table += norm("vision_model.post_layernorm", "ln_post")
    return table + hugging_face_layers("vision_model.encoder.layers", depth)


def openclip(state: Mapping, path: Path) -> Source | None:
    """The tower of OpenAI's and OpenCLIP's models; None where the arrays are none of theirs.

    Raises UserError where it is not CLIP's ViT.
    """
    vision = part(state, "visual.")
    if not vision:
        return None
    if "layer1.0.conv1.weight" in vision:
        raise refusal(path, "holds a CLIP ResNet; the teacher must be a ViT")
    if "class_embedding" not in vision or "proj" not in vision:
        raise refusal(path, "holds no CLIP tower with class_embedding and proj")
    width = len(vision["class_embedding"])
    told, claims = _of_open_clip(path.parent, width)
    if not told:
        told, claims = _of_hugging_face(path.parent)
    told |= normalisation.told(path.parent)
    if all(name in state for name in OPENAI):
        told |= _of_openai(told, width, path)
    return Source(vision, openclip_entries, told=told, claims=claims)


def _of_openai(told: Mapping, width: int, path: Path) -> dict:
    """What OpenAI's code has for all its models. Raises UserError where JSON beside tells another:
    OpenCLIP's ViT-B-16.json, say, has an exact GELU."""
    own = {"heads": width // 64, "activation": "quick_gelu", "mean": CLIP_MEAN, "std": CLIP_STD}
    for name, value in own.items():
        other = told.get(name, value)
        if not (normalisation.same(other, value) if isinstance(value, tuple) else other == value):
            raise UserError(
                f"{path} is OpenAI's own, whose code has {name} {value}, the JSON beside it says "
                f"{other}: remove that JSON"
            )
    return own


def _of_open_clip(directory: Path, width: int) -> tuple[dict, dict]:
    """`told` and `claims` of OpenCLIP's JSON; both empty where there is none."""
    told, claims = open_clip.config(directory)
    if told:
        head_width = told.pop("head_width")
        told["heads"] = width // head_width
        if head_width > width:
            raise UserError(
                f"{directory}: OpenCLIP's JSON has head_width {head_width}, the arrays "
                f"width {width}"
            )
    return told, claims


def _of_hugging_face(directory: Path) -> tuple[dict, dict]:
    return hugging_face.config(directory, TYPES, activation="quick_gelu")


def hf(state: Mapping, path: Path) -> Source | None:
    """The tower of a CLIPModel or CLIPVisionModelWithProjection; None where the arrays are no CLIP.

    Raises UserError where the projection is not there.
    """
    marks = ("embeddings.class_embedding", "pre_layrnorm.weight", "pre_layrnorm.bias")
    if not any(f"{prefix}{mark}" in state for prefix in ("vision_model.", "") for mark in marks):
        return None
    if "visual_projection.weight" not in state:
        raise UserError(
            f"{path} has no visual_projection.weight: save a CLIPModel or a "
            f"CLIPVisionModelWithProjection"
        )
    vision = {n: x for n, x in state.items() if n.startswith(("vision_model.", "visual_proj"))}
    vision.pop("vision_model.embeddings.position_ids", None)  # a buffer of old versions
    told, claims = _of_hugging_face(path.parent)
    if not told:
        width = vision.get("vision_model.embeddings.class_embedding", np.zeros(0)).size
        told, claims = _of_open_clip(path.parent, width)
    told |= normalisation.told(path.parent)
    return Source(vision, hf_entries, told=told, claims=claims)


def save(directory, params, tower: Tower):
    """Writes a CLIP tower as OpenCLIP does: open_clip_model.safetensors and its config JSON."""
    flat = {name: np.asarray(leaf) for name, leaf in layout.flatten(params).items()}
    state = layout.write(openclip_entries(tower.depth), flat)
    state = {f"visual.{name}": array for name, array in state.items()}
    vision = {
        "image_size": tower.image_size,
        "layers": tower.depth,
        "width": tower.width,
        "head_width": tower.width // tower.heads,
        "patch_size": tower.patch,
        "mlp_ratio": tower.mlp_width / tower.width,
    }
    if tower.activation == "gelu_tanh":
        vision["act_kwargs"] = {"approximate": "tanh"}
    if tower.eps != 1e-5:
        vision["norm_kwargs"] = {"eps": tower.eps}
    config = {
        "model_cfg": {
            "embed_dim": tower.out_width,
            "quick_gelu": tower.activation == "quick_gelu",
            "vision_cfg": vision,
        },
        "preprocess_cfg": {"mean": list(tower.mean), "std": list(tower.std)},
    }
    directory = Path(directory)
    files.write_safetensors(directory / "open_clip_model.safetensors", state, {"format": "pt"})
    (directory / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")
