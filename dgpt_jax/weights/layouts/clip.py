"""CLIP vision towers as published by OpenAI and OpenCLIP (`visual.*`) and by Hugging Face.

The teacher's tokens are all tokens after `ln_post` and `proj`, CLS first.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dgpt_jax.data.normalization import CLIP_MEAN, CLIP_STD
from dgpt_jax.errors import UserError
from dgpt_jax.models.teacher_vit import TeacherArchitecture
from dgpt_jax.weights import files, hf_json, mapping, mean_std, open_clip_json
from dgpt_jax.weights.mapping import ArrayEntry, hugging_face_layers, linear, norm
from dgpt_jax.weights.source import Source, strip_prefix, unsupported

# {model_type: default eps} of Hugging Face's models with these names.
KINDS = ("clip", "metaclip_2", "chinese_clip")
TYPES = {f"{kind}{suffix}": 1e-5 for kind in KINDS for suffix in ("", "_vision_model")}
# Scalars in OpenAI's own files, which no other program writes. Its `clip/model.py` has heads of 64
# channels and QuickGELU, `clip/clip.py` one mean and std for all models.
OPENAI = ("input_resolution", "context_length", "vocab_size")


def openclip_entries(depth: int) -> list[ArrayEntry]:
    """Table by OpenAI's and OpenCLIP's names, without `visual.`."""
    table = [
        ArrayEntry("class_embedding", "class_embedding"),
        ArrayEntry("positional_embedding", "positions"),
        ArrayEntry("conv1.weight", "patch_embed/kernel", "conv"),
        ArrayEntry("proj", "proj/kernel"),  # stored (in, out), unlike a Linear
    ]
    table += norm("ln_pre", "ln_pre") + norm("ln_post", "ln_post")
    for i in range(depth):
        block = f"transformer.resblocks.{i}"
        table += norm(f"{block}.ln_1", "blocks/norm1", layer=i)
        table += norm(f"{block}.ln_2", "blocks/norm2", layer=i)
        qkv = "blocks/attn/qkv"
        table.append(ArrayEntry(f"{block}.attn.in_proj_weight", f"{qkv}/kernel", "linear", layer=i))
        table.append(ArrayEntry(f"{block}.attn.in_proj_bias", f"{qkv}/bias", "vector", layer=i))
        table += linear(f"{block}.attn.out_proj", "blocks/attn/proj", layer=i)
        table += linear(f"{block}.mlp.c_fc", "blocks/mlp/fc1", layer=i)
        table += linear(f"{block}.mlp.c_proj", "blocks/mlp/fc2", layer=i)
    return table


def hf_entries(depth: int) -> list[ArrayEntry]:
    """Table by Hugging Face's names (CLIPModel, CLIPVisionModelWithProjection)."""
    table = [
        ArrayEntry("vision_model.embeddings.class_embedding", "class_embedding"),
        ArrayEntry("vision_model.embeddings.position_embedding.weight", "positions"),
        ArrayEntry("vision_model.embeddings.patch_embedding.weight", "patch_embed/kernel", "conv"),
        ArrayEntry("visual_projection.weight", "proj/kernel", "linear"),
    ]
    table += norm("vision_model.pre_layrnorm", "ln_pre")  # sic
    table += norm("vision_model.post_layernorm", "ln_post")
    return table + hugging_face_layers("vision_model.encoder.layers", depth)


def openclip(state: Mapping[str, np.ndarray], path: Path) -> Source | None:
    """Vision tower of OpenAI's and OpenCLIP's models; None for other arrays.

    Raises UserError if it is not CLIP's ViT.
    """
    vision = strip_prefix(state, "visual.")
    if not vision:
        return None
    if "layer1.0.conv1.weight" in vision:
        raise unsupported(path, "is a CLIP ResNet, but the teacher must be a ViT")
    if "class_embedding" not in vision or "proj" not in vision:
        raise unsupported(path, "has no CLIP tower with class_embedding and proj")
    width = len(vision["class_embedding"])
    settings, expected = _open_clip_settings(path.parent, width)
    if not settings:
        settings, expected = _hugging_face_settings(path.parent)
    settings |= mean_std.read(path.parent)
    if all(name in state for name in OPENAI):
        settings |= _openai_settings(settings, width, path)
    return Source(vision, openclip_entries, settings=settings, expected=expected)


def _openai_settings(stated: Mapping[str, Any], width: int, path: Path) -> dict[str, Any]:
    """Settings of OpenAI's code for all its models. Raises UserError if JSON states others: an
    OpenCLIP ViT-B-16.json, for example, has an exact GELU."""
    settings = {
        "heads": width // 64, "activation": "quick_gelu", "mean": CLIP_MEAN, "std": CLIP_STD
    }  # fmt: skip
    for name, value in settings.items():
        other = stated.get(name, value)
        if not (mean_std.same(other, value) if isinstance(value, tuple) else other == value):
            raise UserError(
                f"{path} is OpenAI's own, whose code has {name} {value}, but the JSON beside it "
                f"has {other}: remove that JSON"
            )
    return settings


def _open_clip_settings(directory: Path, width: int) -> tuple[dict, dict]:
    """(`settings`, `expected`) of OpenCLIP's JSON; both empty without it."""
    settings, expected = open_clip_json.config(directory)
    if settings:
        head_width = settings.pop("head_width")
        settings["heads"] = width // head_width
        if head_width > width:
            raise UserError(
                f"{directory}: OpenCLIP's JSON has head_width {head_width}, the arrays have "
                f"width {width}"
            )
    return settings, expected


def _hugging_face_settings(directory: Path) -> tuple[dict, dict]:
    return hf_json.config(directory, TYPES, activation="quick_gelu")


def hf(state: Mapping[str, np.ndarray], path: Path) -> Source | None:
    """Vision tower of a CLIPModel or CLIPVisionModelWithProjection; None for other arrays.

    Raises UserError if the projection is missing.
    """
    leaves = ("embeddings.class_embedding", "pre_layrnorm.weight", "pre_layrnorm.bias")
    if not any(f"{prefix}{leaf}" in state for prefix in ("vision_model.", "") for leaf in leaves):
        return None
    if "visual_projection.weight" not in state:
        raise UserError(
            f"{path} has no visual_projection.weight: save a CLIPModel or a "
            f"CLIPVisionModelWithProjection"
        )
    vision = {n: x for n, x in state.items() if n.startswith(("vision_model.", "visual_proj"))}
    vision.pop("vision_model.embeddings.position_ids", None)  # a buffer of old versions
    settings, expected = _hugging_face_settings(path.parent)
    if not settings:
        width = vision.get("vision_model.embeddings.class_embedding", np.zeros(0)).size
        settings, expected = _open_clip_settings(path.parent, width)
    settings |= mean_std.read(path.parent)
    return Source(vision, hf_entries, settings=settings, expected=expected)


def save(directory: Path | str, params: Mapping[str, Any], tower: TeacherArchitecture) -> None:
    """Writes a CLIP tower as OpenCLIP does: open_clip_model.safetensors and its config JSON."""
    flat = {name: np.asarray(leaf) for name, leaf in mapping.flatten(params).items()}
    state = mapping.write(openclip_entries(tower.depth), flat)
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
