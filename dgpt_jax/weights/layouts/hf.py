"""Hugging Face's ViTModel and ViTForImageClassification, as `save_pretrained` writes them.

They norm every token and classify CLS: pooling "cls", and no other.
"""

import json
from pathlib import Path

from dgpt_jax.convert import files, hugging_face, layout, normalisation
from dgpt_jax.convert.json_files import check_claims, class_names, count, group, read_json
from dgpt_jax.convert.layout import Entry, linear, norm
from dgpt_jax.convert.weights import (
    Layout,
    Preprocess,
    Weights,
    assumed,
    crop_pct,
    depth_of,
    encoder_model,
    encoder_shapes,
    image_side,
    needed,
    resized,
)
from dgpt_jax.schema import UserError

PATCH = "embeddings.patch_embeddings.projection"
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}
# `model_type` of Hugging Face's models of these names, and the eps that their configs leave out.
TYPES = {"vit": 1e-12, "vit_msn": 1e-6}
# Pillow's numbers of its filters.
FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}


def entries(depth: int, *, head: bool) -> list[Entry]:
    """The table for heads.Classifier's parameters; the tower has a prefix beside a classifier."""
    table = [Entry("embeddings.cls_token", "encoder/cls_token")]
    table.append(Entry("embeddings.position_embeddings", "pos_embed"))
    table += layout.patch_embed(PATCH, "encoder/patch_embed")
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
    return layout.prefixed("vit.", table) + linear("classifier", "head")


def _table(weights: Weights) -> list[Entry]:
    return entries(weights.model.depth, head=weights.num_classes > 0)


def read(state, path: Path, heads=None, decoder_heads=None) -> Weights:
    """Weights from a state dict, with config.json and preprocessor_config.json beside it."""
    told, claims = hugging_face.config(path.parent, TYPES, activation="gelu")
    if not told:
        raise UserError(f"{path}: Hugging Face's config.json must lie beside it")
    if heads not in (None, told["heads"]):
        raise UserError(f"{path}: {heads} heads are given, its config.json says {told['heads']}")
    classes = len(state["classifier.bias"]) if "classifier.bias" in state else 0
    if not classes:  # a model with another head, or none
        state = {n.removeprefix("vit."): x for n, x in state.items()}
    tower = "vit." if classes else ""
    names = (f"{PATCH}.weight", "embeddings.position_embeddings",
             "encoder.layer.0.intermediate.dense.bias")  # fmt: skip
    kernel, positions, hidden = needed(state, [tower + n for n in names], path)
    width, _, patch, _ = kernel.shape
    model = encoder_model(
        width=width,
        patch=patch,
        heads=told["heads"],
        depth=depth_of(state, f"{tower}encoder.layer.", path),
        mlp_width=len(hidden),
        image_size=image_side(positions.shape[1], patch, path),
        eps=told["eps"],
        activation=told["activation"],
    )
    size = told.get("image_size", model.image_size)
    claims["grid"] = (size // patch, f"image_size // {patch} in its config.json")
    check_claims(claims, vars(model) | {"mlp_width": len(hidden), "grid": model.grid}, path)
    notes = ()
    if "pooler.dense.weight" in state and not classes:
        state = {n: x for n, x in state.items() if not n.startswith("pooler.dense.")}
        notes = (f"{path}: the pooler (dense, tanh) is left out: features are the normed CLS",)
    table = entries(model.depth, head=classes > 0)
    params = layout.read(table, state, encoder_shapes(model, "cls", classes), what=str(path))
    preprocess, unknown = _preprocess(path.parent, model.image_size)
    notes += assumed(path, unknown, "those of ViTImageProcessor (0.5, bilinear)")
    names = ()
    if classes:
        file = path.parent / "config.json"
        names = class_names(read_json(file).get("id2label"), classes, f"{file}: id2label")
    return Weights(model, params, "cls", str(path), preprocess, notes=notes, classes=names)


def _processor(directory: Path) -> tuple[dict, Path]:
    """(what an image processor is made of, from where); transformers 5 looks in this order."""
    file = directory / "processor_config.json"
    told = group(read_json(file), "image_processor", file) if file.is_file() else {}
    if told:
        return told, file
    file = directory / "preprocessor_config.json"
    return (read_json(file) if file.is_file() else {}), file


def _preprocess(directory: Path, image_size: int) -> tuple[Preprocess, list[str]]:
    """(how pictures are prepared, what of it nothing tells and is ViTImageProcessor's)."""
    told, file = _processor(directory)
    told = {name: value for name, value in told.items() if value is not None}
    channels = normalisation.image_processor(told, file)
    unknown = [name for name in ("mean", "std") if name not in channels]
    unknown += ["filter"] if "resample" not in told else []
    resample = told.get("resample", FILTERS["bilinear"])
    filters = {number: name for name, number in FILTERS.items()}
    if resample not in filters:
        raise UserError(f"{file}: resample {resample} is none of {FILTERS}")
    size = told.get("size", {"height": image_size, "width": image_size})
    size = {"height": size, "width": size} if isinstance(size, int) else size
    edge = size.get("shortest_edge", size.get("height"))
    if not edge or size.get("width", edge) != edge:
        raise UserError(f"{file}: size {size} is neither a square nor a shortest_edge")
    edge = count(edge, f"{file}: size")
    how = Preprocess(
        mean=channels.get("mean", (0.5, 0.5, 0.5)),
        std=channels.get("std", (0.5, 0.5, 0.5)),
        interpolation=filters[resample],
        crop_pct=crop_pct(image_size, edge) if told.get("do_center_crop") else 1.0,
        crop_mode="center" if "shortest_edge" in size else "squash",
    )
    return how, unknown


def config_json(weights: Weights) -> dict:
    """What ViTConfig is made of."""
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


def preprocessor_json(weights: Weights) -> dict:
    """What ViTImageProcessor is made of."""
    size, how = weights.model.image_size, weights.preprocess
    if how.crop_mode not in ("center", "squash") or how.interpolation not in FILTERS:
        raise UserError(f"Hugging Face's ViTImageProcessor cannot prepare pictures by {how}")
    edge = resized(size, how.crop_pct)
    squash = {"height": edge, "width": edge}
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": squash if how.crop_mode == "squash" else {"shortest_edge": edge},
        "resample": FILTERS[how.interpolation],
        "do_center_crop": edge != size or how.crop_mode == "center",
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(how.mean),
        "image_std": list(how.std),
    }


def save(weights: Weights, path: Path):
    """Writes model.safetensors, config.json and preprocessor_config.json."""
    if weights.pooling != "cls":
        raise UserError(
            f"Hugging Face's ViT norms all tokens and reads CLS: it cannot hold mean pooling with "
            f"a norm after it (of {weights.source}): use --to=timm"
        )
    preprocessor = preprocessor_json(weights)
    state = layout.write(_table(weights), weights.params)
    files.write_safetensors(path / "model.safetensors", state, {"format": "pt"})
    for name, content in (("config", config_json(weights)), ("preprocessor_config", preprocessor)):
        (path / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


LAYOUT = Layout(
    "hf",
    found=lambda state, path: (
        state is not None and any(f"{prefix}{PATCH}.weight" in state for prefix in ("", "vit."))
    ),
    read=read,
    table=_table,
    save=save,
)
