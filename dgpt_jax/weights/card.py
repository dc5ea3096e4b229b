"""The Markdown card beside an export: what it is, where it comes from, how it is loaded."""

import hashlib
import json
from pathlib import Path

import numpy as np
from etils import epath

from dgpt_jax import class_names, run_log, schema
from dgpt_jax.convert.weights import Weights


def mark(target: Path) -> str:
    """The first line of a card: which export it is of."""
    return f"<!-- written by dgpt_jax's tools/convert.py for {target.name} -->"


def text(weights: Weights, name: str, where: Path, file: Path, *, verified: str) -> str:
    """The card of weights in layout `name`, to be loaded from `where`; `file` has the arrays."""
    model = weights.model
    title = f"ViT {model.width}×{model.depth}, patch {model.patch}, {model.image_size} px"
    what = "D-iGPT pretraining model" if weights.full else "encoder"
    lines = [
        mark(where),
        f"# {title}",
        "",
        f"A vision transformer ({what}) in layout `{name}`.",
        "",
    ]
    rows = {
        "source": weights.source,
        "parameters": f"{sum(x.size for x in weights.params.values()):,}",
        "heads, MLP ratio": f"{model.heads}, {model.mlp_ratio:g}",
        "LayerNorm eps, GELU": f"{model.eps:g}, {model.activation}",
        "pooling": weights.pooling or "none: decoders read tapped blocks",
        "classes": class_names.shown(weights.classes) if weights.classes else weights.num_classes,
        "pictures": _pictures(weights),
        **_run(weights.run),
        "check": verified,
    }
    lines += ["| | |", "|---|---|", *(f"| {k} | {_cell(v)} |" for k, v in rows.items()), ""]
    lines += [*_hashes(file), "## Loading", ""]
    for snippet in loading(weights, name, where):
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


def _pictures(weights: Weights) -> str:
    how = weights.preprocess
    return (
        f"RGB in [0, 1], minus {list(how.mean)}, over {list(how.std)}; {how.interpolation}, "
        f"crop_pct {how.crop_pct:g}, {how.crop_mode}"
    )


def _run(run) -> dict:
    """Step, data and teacher of the training, as far as its config tells."""
    config = run.get("config", {})
    data, teacher = config.get("data", {}), config.get("teacher", {})
    found = {
        "step": run.get("step"),
        "data": data.get("path"),
        "data's source": data.get("source"),
        "targets": data.get("targets"),
        "teacher": teacher.get("weights"),
    }
    store = Path(str(data.get("path"))) / "token_store.json"
    if store.is_file():
        told = json.loads(store.read_text())
        found["teacher"] = ", ".join(f"{k} {v}" for k, v in told["teacher"].items())
        found["pictures of"] = ", ".join(f"{k} {v}" for k, v in told["source"].items())
    return {name: value for name, value in found.items() if value not in (None, "")}


def _hashes(file: Path) -> list[str]:
    if not file.is_file():
        return []
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return [f"SHA-256 of `{file.name}`: `{digest}`", ""]


def _metrics(run) -> list[str]:
    """The newest value of everything that the run logged, up to the step."""
    path = epath.Path(run.get("directory", "")) / run_log.FILE
    if "directory" not in run or not path.is_file():
        return []
    newest = {}
    for name, curve in run_log.read(run["directory"]).curves.items():
        if (index := int(np.searchsorted(curve.steps, run["step"], side="right")) - 1) >= 0:
            newest[name] = curve.point(index)
    rows = [f"| {n} | {v:.5g} | {s} |" if isinstance(v, float) else f"| {n} | {v} | {s} |"
            for n, (v, s) in sorted(newest.items())]  # fmt: skip
    return ["## Metrics", "", "| | value | step |", "|---|---|---|", *rows, ""]


def loading(weights: Weights, name: str, path: Path) -> list[list[str]]:
    """Three lines of Python for each library that loads this layout; the second loads."""
    snippets = []
    if name == "timm":
        snippets.append(
            ["import timm",
             f'model = timm.create_model("local-dir:{path}", pretrained=True).eval()',
             "transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))"]
        )  # fmt: skip
    if name == "hf":
        kind, more = "ViTModel", ", add_pooling_layer=False"
        if weights.num_classes:
            kind, more = "ViTForImageClassification", ""
        snippets.append(
            [f"from transformers import {kind}, ViTImageProcessor",
             f'model = {kind}.from_pretrained("{path}"{more})',
             f'processor = ViTImageProcessor.from_pretrained("{path}")']
        )  # fmt: skip
    if name == "digpt" and path.suffix == ".pth":
        snippets.append(
            ["import torch",
             f'state = torch.load("{path}", map_location="cpu", weights_only=True)["model"]',
             "model.load_state_dict(state)  # of the official models_digpt.py"]
        )  # fmt: skip
    heads = ""
    if name == "digpt":
        heads = f", heads={weights.model.heads}, decoder_heads={weights.model.decoder_heads}"
    last = (
        f'model = dgpt_jax.load_digpt("{path}"{heads})'
        if weights.full
        else f'encoder = dgpt_jax.load_encoder("{path}")'
    )
    use = (
        "losses = model.losses(images, tokens, orders)"
        if weights.full
        else f'features = encoder.features(pictures, "{weights.pooling}")  # uint8 RGB'
    )
    return [*snippets, ["import dgpt_jax", last, use]]
