"""Model card of an export in Markdown: model, origin, metrics and how to load it."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from dgpt_jax.config import schema
from dgpt_jax.data import class_names
from dgpt_jax.data.token_store import StoreInfo
from dgpt_jax.monitoring import markdown, metrics_log
from dgpt_jax.weights.types import Weights


def mark(target: Path) -> str:
    """First line of an export's card, which identifies it."""
    return f"<!-- written by dgpt_jax's tools/convert.py for {target.name} -->"


def text(weights: Weights, name: str, target: Path, file: Path, *, verified: str) -> str:
    """Card of weights in layout `name`, to be loaded from `target`; `file` contains the arrays."""
    model = weights.model
    kind = "A D-iGPT pretraining model: encoder and decoders" if weights.full else "An encoder"
    lines = [
        mark(target),
        f"# ViT {model.width}×{model.depth}, patch {model.patch}, {model.image_size} px",
        "",
        f"{kind}, in layout `{name}`.",
        "",
    ]
    rows = {
        "source": weights.source,
        "parameters": f"{sum(x.size for x in weights.params.values()):,}",
        "heads, MLP ratio": f"{model.heads}, {model.mlp_ratio:g}",
        "LayerNorm eps, activation": f"{model.eps:g}, {model.activation}",
        "pooling": weights.pooling or "none (the decoders read intermediate blocks)",
        "classes": class_names.summary(weights.classes) if weights.classes else weights.num_classes,
        "preprocessing": _preprocessing(weights),
        **_training(weights.run),
        "check": verified,
    }
    cells = ((k, _cell(v)) for k, v in rows.items())
    lines += ["| | |", "|---|---|", *map(markdown.row, cells), ""]
    lines += [*_hashes(file), "## Loading", ""]
    for snippet in loading(weights, name, target):
        lines += ["```python", *snippet, "```", ""]
    lines += _metrics(weights.run)
    if "config" in weights.run:
        config = {k: v for k, v in schema.flatten(weights.run["config"]).items() if v != ""}
        lines += [
            "## Configuration",
            "",
            "```",
            *(f"{k} = {v!r}" for k, v in config.items()),
            "```",
        ]
    return "\n".join(lines).rstrip() + "\n"


def _cell(value) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _preprocessing(weights: Weights) -> str:
    cfg = weights.preprocess
    return (
        f"{cfg.interpolation} resize, crop_pct {cfg.crop_pct:g}, crop mode {cfg.crop_mode}; RGB in "
        f"[0, 1], mean {list(cfg.mean)}, std {list(cfg.std)}"
    )


def _training(run: Mapping[str, Any]) -> dict[str, Any]:
    """Step, data and teacher of the training, as far as recorded."""
    config = run.get("config", {})
    data, teacher = config.get("data", {}), config.get("teacher", {})
    rows = {
        "step": run.get("step"),
        "data": data.get("path"),
        "source images": data.get("source"),
        "targets": data.get("targets"),
        "teacher": teacher.get("weights"),
        "initial weights": ", ".join(f"{k} {v}" for k, v in run.get("init", {}).items()),
    }
    store = Path(str(data.get("path"))) / "token_store.json"
    if store.is_file():
        info = StoreInfo.load(store.parent)
        rows["teacher"] = ", ".join(f"{k} {v}" for k, v in info.teacher.weights.items())
        rows["source images"] = ", ".join(f"{k} {v}" for k, v in info.source.items())
    return {name: value for name, value in rows.items() if value not in (None, "")}


def _hashes(file: Path) -> list[str]:
    if not file.is_file():
        return []
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return [f"SHA-256 of `{file.name}`: `{digest}`", ""]


def _metrics(run: Mapping[str, Any]) -> list[str]:
    """Table of the last logged value of each metric up to the step, but for the machine's."""
    path = epath.Path(run.get("directory", "")) / metrics_log.FILE
    if "directory" not in run or not path.is_file():
        return []
    latest = {}
    for name, curve in metrics_log.read(run["directory"]).curves.items():
        if name in metrics_log.OF_THE_MACHINE:
            continue
        if (index := int(np.searchsorted(curve.steps, run["step"], side="right")) - 1) >= 0:
            latest[name] = curve.point(index)
    rows = [
        (name, f"{value:.5g}" if isinstance(value, float) else value, step)
        for name, (value, step) in sorted(latest.items())
    ]
    return ["## Metrics", "", "| | value | step |", "|---|---|---|", *map(markdown.row, rows), ""]


def loading(weights: Weights, name: str, path: Path) -> list[list[str]]:
    """Three lines of Python for each library that loads this layout; the second one loads it."""
    snippets = []
    if name == "timm":
        snippets.append(
            ["import timm",
             f'model = timm.create_model("local-dir:{path}", pretrained=True).eval()',
             "transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))"]
        )  # fmt: skip
    if name == "hf":
        kind, options = "ViTModel", ", add_pooling_layer=False"
        if weights.num_classes:
            kind, options = "ViTForImageClassification", ""
        snippets.append(
            [f"from transformers import {kind}, ViTImageProcessor",
             f'model = {kind}.from_pretrained("{path}"{options})',
             f'processor = ViTImageProcessor.from_pretrained("{path}")']
        )  # fmt: skip
    if name == "digpt" and path.suffix == ".pth":
        snippets.append(
            ["import torch",
             f'state = torch.load("{path}", map_location="cpu", weights_only=True)["model"]',
             "model.load_state_dict(state)  # model: of the official models_digpt.py"]
        )  # fmt: skip
    heads = ""
    if name == "digpt":
        heads = f", heads={weights.model.heads}, decoder_heads={weights.model.decoder_heads}"
    load = (
        f'model = dgpt_jax.load_digpt("{path}"{heads})'
        if weights.full
        else f'encoder = dgpt_jax.load_encoder("{path}")'
    )
    use = (
        "losses = model.losses(images, tokens, orders)"
        if weights.full
        else f'features = encoder.features(images, "{weights.pooling}")  # uint8 RGB'
    )
    return [*snippets, ["import dgpt_jax", load, use]]
