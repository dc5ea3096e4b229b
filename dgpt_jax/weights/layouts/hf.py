"""Hugging Face's ViTModel and ViTForImageClassification, as written by `save_pretrained`.

They norm every token and classify CLS, so pooling is always "cls".
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dgpt_jax.errors import UserError
from dgpt_jax.weights import files, hf_json, mapping, mean_std
from dgpt_jax.weights.config_json import (
    check_sizes,
    class_names,
    get_object,
    positive_int,
    read_json,
)
from dgpt_jax.weights.mapping import ArrayEntry, linear, norm
from dgpt_jax.weights.types import (
    Preprocess,
    WeightLayout,
    Weights,
    assumption_note,
    crop_pct,
    depth_of,
    encoder_model,
    encoder_shapes,
    image_side,
    require_arrays,
    resize_edge,
)

PATCH = "embeddings.patch_embeddings.projection"
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}
# {model_type: default eps} of Hugging Face's models with these names.
TYPES = {"vit": 1e-12, "vit_msn": 1e-6}
# Pillow's filter numbers.
FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}


def entries(depth: int, *, head: bool) -> list[ArrayEntry]:
    """Table for classifier.Classifier's parameters; with a head the tower has the prefix `vit.`."""
    table = [ArrayEntry("embeddings.cls_token", "encoder/cls_token")]
    table.append(ArrayEntry("embeddings.position_embeddings", "pos_embed"))
    table += mapping.patch_embed(PATCH, "encoder/patch_embed")
    for i in range(depth):
        layer, blocks = f"encoder.layer.{i}", "encoder/blocks"
        table += norm(f"{layer}.layernorm_before", f"{blocks}/norm1", layer=i)
        for part, name in enumerate(("query", "key", "value")):
            name = f"{layer}.attention.attention.{name}"
            table += linear(name, f"{blocks}/attn/qkv", layer=i, part=part)
        table += linear(f"{layer}.attention.output.dense", f"{blocks}/attn/proj", layer=i)
        table += norm(f"{layer}.layernorm_after", f"{blocks}/norm2", layer=i)
        table += linear(f"{layer}.intermediate.dense", f"{blocks}/mlp/fc1", layer=i)
        table += linear(f"{layer}.output.dense", f"{blocks}/mlp/fc2", layer=i)
    table += norm("layernorm", "norm")
    if not head:
        return table
    return mapping.prefixed("vit.", table) + linear("classifier", "head")


def _table(weights: Weights) -> list[ArrayEntry]:
    return entries(weights.model.depth, head=weights.num_classes > 0)


def read(
    state: Mapping[str, np.ndarray],
    path: Path,
    heads: int | None = None,
    decoder_heads: int | None = None,
) -> Weights:
    """Weights from a state dict, with config.json and preprocessor_config.json beside it.

    Raises UserError.
    """
    settings, expected = hf_json.config(path.parent, TYPES, activation="gelu")
    if not settings:
        raise UserError(f"{path}: Hugging Face's config.json is missing beside it")
    if heads not in (None, settings["heads"]):
        raise UserError(f"{path}: heads is set to {heads}, its config.json has {settings['heads']}")
    classes = len(state["classifier.bias"]) if "classifier.bias" in state else 0
    if not classes:  # a model with another head, or none
        state = {n.removeprefix("vit."): x for n, x in state.items()}
    prefix = "vit." if classes else ""
    names = (f"{PATCH}.weight", "embeddings.position_embeddings",
             "encoder.layer.0.intermediate.dense.bias")  # fmt: skip
    kernel, positions, hidden = require_arrays(state, [prefix + n for n in names], path)
    width, _, patch, _ = kernel.shape
    model = encoder_model(
        width=width,
        patch=patch,
        heads=settings["heads"],
        depth=depth_of(state, f"{prefix}encoder.layer.", path),
        mlp_width=len(hidden),
        image_size=image_side(positions.shape[1], patch, path),
        eps=settings["eps"],
        activation=settings["activation"],
    )
    size = settings.get("image_size", model.image_size)
    expected["grid"] = (size // patch, f"image_size // {patch} in its config.json")
    check_sizes(expected, vars(model) | {"mlp_width": len(hidden), "grid": model.grid}, path)
    notes = ()
    if "pooler.dense.weight" in state and not classes:
        state = {n: x for n, x in state.items() if not n.startswith("pooler.dense.")}
        notes = (f"{path}: dropped the pooler (dense, tanh): features are the normed CLS",)
    table = entries(model.depth, head=classes > 0)
    params = mapping.read(table, state, encoder_shapes(model, "cls", classes), what=str(path))
    preprocess, missing = _preprocess(path.parent, model.image_size)
    notes += assumption_note(path, missing, "those of ViTImageProcessor (0.5, bilinear)")
    names = ()
    if classes:
        file = path.parent / "config.json"
        names = class_names(read_json(file).get("id2label"), classes, f"{file}: id2label")
    return Weights(model, params, "cls", str(path), preprocess, notes=notes, classes=names)


def _processor(directory: Path) -> tuple[dict[str, Any], Path]:
    """(settings of the image processor, their file), in the order of transformers 5."""
    file = directory / "processor_config.json"
    settings = get_object(read_json(file), "image_processor", file) if file.is_file() else {}
    if settings:
        return settings, file
    file = directory / "preprocessor_config.json"
    return (read_json(file) if file.is_file() else {}), file


def _preprocess(directory: Path, image_size: int) -> tuple[Preprocess, list[str]]:
    """(preprocessing, names of unspecified settings, for which it has ViTImageProcessor's)."""
    settings, file = _processor(directory)
    settings = {name: value for name, value in settings.items() if value is not None}
    channels = mean_std.image_processor(settings, file)
    missing = [name for name in ("mean", "std") if name not in channels]
    missing += ["filter"] if "resample" not in settings else []
    resample = settings.get("resample", FILTERS["bilinear"])
    filters = {number: name for name, number in FILTERS.items()}
    if resample not in filters:
        raise UserError(f"{file}: resample {resample} is none of {FILTERS}")
    size = settings.get("size", {"height": image_size, "width": image_size})
    size = {"height": size, "width": size} if isinstance(size, int) else size
    edge = size.get("shortest_edge", size.get("height"))
    if not edge or size.get("width", edge) != edge:
        raise UserError(f"{file}: size {size} is neither a square nor a shortest_edge")
    edge = positive_int(edge, f"{file}: size")
    preprocess = Preprocess(
        mean=channels.get("mean", (0.5, 0.5, 0.5)),
        std=channels.get("std", (0.5, 0.5, 0.5)),
        interpolation=filters[resample],
        crop_pct=crop_pct(image_size, edge) if settings.get("do_center_crop") else 1.0,
        crop_mode="center" if "shortest_edge" in size else "squash",
    )
    return preprocess, missing


def config_json(weights: Weights) -> dict[str, Any]:
    """Content of a ViTConfig."""
    model, classes = weights.model, weights.num_classes
    labels = dict(enumerate(weights.classes or (f"LABEL_{i}" for i in range(classes))))
    return {
        "architectures": ["ViTForImageClassification" if classes else "ViTModel"],
        "model_type": "vit",
        "dtype": "float32",
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "intermediate_size": int(model.width * model.mlp_ratio),
        "hidden_act": ACTIVATIONS[model.activation],
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": model.eps,
        "image_size": model.image_size,
        "patch_size": model.patch,
        "num_channels": 3,
        "qkv_bias": True,
        **({"id2label": labels, "label2id": {v: k for k, v in labels.items()}} if classes else {}),
    }


def preprocessor_json(weights: Weights) -> dict[str, Any]:
    """Content of a ViTImageProcessor. Raises UserError if it cannot represent the preprocessing."""
    size, preprocess = weights.model.image_size, weights.preprocess
    if preprocess.crop_mode not in ("center", "squash") or preprocess.interpolation not in FILTERS:
        raise UserError(f"Hugging Face's ViTImageProcessor does not support {preprocess}")
    edge = resize_edge(size, preprocess.crop_pct)
    squash = {"height": edge, "width": edge}
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": squash if preprocess.crop_mode == "squash" else {"shortest_edge": edge},
        "resample": FILTERS[preprocess.interpolation],
        "do_center_crop": edge != size or preprocess.crop_mode == "center",
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }


def save(weights: Weights, path: Path) -> None:
    """Writes model.safetensors, config.json and preprocessor_config.json. Raises UserError."""
    if weights.pooling != "cls":
        raise UserError(
            f"Hugging Face's ViT norms all tokens and reads CLS, so it cannot represent mean "
            f"pooling with a norm after it (of {weights.source}): use --to=timm"
        )
    preprocessor = preprocessor_json(weights)
    state = mapping.write(_table(weights), weights.params)
    files.write_safetensors(path / "model.safetensors", state, {"format": "pt"})
    for name, content in (("config", config_json(weights)), ("preprocessor_config", preprocessor)):
        (path / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


LAYOUT = WeightLayout(
    "hf",
    detect=lambda state, path: (
        state is not None and any(f"{prefix}{PATCH}.weight" in state for prefix in ("", "vit."))
    ),
    read=read,
    table=_table,
    save=save,
)
