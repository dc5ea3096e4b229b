"""CLIP vision towers as they are published: OpenAI and OpenCLIP (`visual.*`), Hugging Face.

A state dict does not tell head count and activation. They come from the JSON beside the weights
(open_clip_config.json, or Hugging Face's config.json) or from the caller, never from a guess.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

from dgpt_jax.clip import CLIP_MEAN, CLIP_STD, ClipTower, Tower
from dgpt_jax.convert import files, layout
from dgpt_jax.convert.layout import Entry, linear, norm
from dgpt_jax.schema import UserError
from dgpt_jax.vit import ACTIVATIONS

FILES = (
    "model.safetensors",
    files.INDEX,
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
)


@dataclass(frozen=True)
class Loaded:
    """A teacher: its tower, nested float32 parameters, name and weight hash, remarks to print."""

    tower: Tower
    params: dict
    name: str
    hash: str
    notes: tuple[str, ...]


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
    for i in range(depth):
        block = f"vision_model.encoder.layers.{i}"
        table += norm(f"{block}.layer_norm1", "blocks/norm1", layer=i)
        table += norm(f"{block}.layer_norm2", "blocks/norm2", layer=i)
        for part, name in enumerate("qkv"):
            source = f"{block}.self_attn.{name}_proj"
            table += linear(source, "blocks/attn/qkv", layer=i, part=part)
        table += linear(f"{block}.self_attn.out_proj", "blocks/attn/proj", layer=i)
        table += linear(f"{block}.mlp.fc1", "blocks/mlp/fc1", layer=i)
        table += linear(f"{block}.mlp.fc2", "blocks/mlp/fc2", layer=i)
    return table


def load(
    weights: str,
    *,
    image_size: int | None = None,
    heads: int | None = None,
    activation: str | None = None,
) -> Loaded:
    """The teacher in a weights file, or in a directory with one of FILES.

    `image_size` other than the weights' interpolates the positions. Raises UserError on layouts
    that are not CLIP vision towers, missing or unknown arrays, unknown or contradicting settings.
    """
    path = _find(Path(weights))
    state = files.read_state(path.parent if path.name == files.INDEX else path)
    entries_of, state = _vision_part(state, path)
    config = _json_beside(path.parent)
    given = {"heads": heads, "activation": activation}
    tower = _tower(state, entries_of, config, given, path)
    entries = entries_of(tower.depth)
    shapes = parameter_shapes(tower)
    flat = layout.read(entries, state, shapes, what=str(path))
    notes = ()
    if image_size is not None and image_size != tower.image_size:
        if image_size % tower.patch:
            raise UserError(f"image_size {image_size} is no multiple of the patch {tower.patch}")
        old, tower = tower.image_size, replace(tower, image_size=image_size)
        flat["positions"] = interpolate_positions(flat["positions"], tower.grid)
        notes = (f"{path}: positions interpolated from {old} to {image_size} pixels",)
    name = path.parent.name if path.name in FILES else path.stem
    return Loaded(tower, layout.unflatten(flat), name, files.hash_state(state), notes)


def parameter_shapes(tower: Tower) -> dict[str, tuple[int, ...]]:
    """{path: shape} of a tower's parameters."""
    images = np.zeros((1, tower.image_size, tower.image_size, 3), np.float32)
    params = jax.eval_shape(ClipTower(tower).init, jax.random.key(0), images)["params"]
    return {name: leaf.shape for name, leaf in layout.flatten(params).items()}


def interpolate_positions(positions: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """(1+N, D) to (1+rows·cols, D): bicubic with torch's kernel, not antialiased; CLS is kept."""
    side = round((len(positions) - 1) ** 0.5)
    width = positions.shape[1]
    table = positions[1:].reshape(side, side, width)
    table = jax.image.resize(table, (*grid, width), "cubic-pytorch", antialias=False)
    return np.concatenate([positions[:1], np.asarray(table).reshape(-1, width)])


def save(directory, params, tower: Tower):
    """Writes a tower as OpenCLIP does: FILES' open_clip_model.safetensors and its config JSON."""
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


def _find(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in FILES:
        if (path / name).is_file():
            return path / name
    raise UserError(f"{path} holds none of {', '.join(FILES)}")


def _vision_part(state: Mapping, path: Path):
    """(table of names, arrays of the vision tower) of a whole CLIP's state dict."""
    if any(name.startswith("visual.") for name in state):
        vision = {n.removeprefix("visual."): x for n, x in state.items() if n.startswith("visual.")}
        if "layer1.0.conv1.weight" in vision:
            raise UserError(f"{path} holds a CLIP ResNet; the teacher must be a ViT")
        if "class_embedding" not in vision or "proj" not in vision:
            raise UserError(f"{path}: a CLIP tower with class_embedding and proj is needed")
        return openclip_entries, vision
    if any(name.startswith("vision_model.") for name in state):
        vision = {n: x for n, x in state.items() if n.startswith(("vision_model.", "visual_proj"))}
        vision.pop("vision_model.embeddings.position_ids", None)  # a buffer of old versions
        if "visual_projection.weight" not in vision:
            raise UserError(
                f"{path} has no visual_projection.weight: save a CLIPModel or a "
                f"CLIPVisionModelWithProjection"
            )
        return hf_entries, vision
    raise UserError(f"{path} is no CLIP: it has neither visual.* nor vision_model.* arrays")


def _json_beside(directory: Path) -> dict:
    """What the JSON beside the weights says of heads, activation, eps, mean and std."""
    known = {}
    openclip, hf = directory / "open_clip_config.json", directory / "config.json"
    if openclip.is_file():
        content = json.loads(openclip.read_text())
        model = content["model_cfg"]
        vision = model["vision_cfg"]
        known["heads"] = vision["width"] // vision.get("head_width", 64)
        known["activation"] = "quick_gelu" if model.get("quick_gelu") else "gelu"
        preprocess = content.get("preprocess_cfg", {})
        known |= {k: tuple(preprocess[k]) for k in ("mean", "std") if k in preprocess}
    elif hf.is_file():
        content = json.loads(hf.read_text())
        vision = content.get("vision_config", content)
        # Hugging Face leaves out values that equal its class's defaults.
        known["heads"] = vision.get("num_attention_heads", 12)
        known["activation"] = vision.get("hidden_act", "quick_gelu")
        known["eps"] = vision.get("layer_norm_eps", 1e-5)
        preprocess = directory / "preprocessor_config.json"
        if preprocess.is_file():
            content = json.loads(preprocess.read_text())
            names = (("mean", "image_mean"), ("std", "image_std"))
            known |= {ours: tuple(content[hf]) for ours, hf in names if hf in content}
    return known


def _tower(state, entries_of, config: Mapping, given: Mapping, path: Path) -> Tower:
    """The tower of a state dict, with what only JSON and caller know."""
    for name, value in given.items():
        if value is not None and config.get(name, value) != value:
            raise UserError(
                f"{path}: config.teacher.{name} is {value!r}, the JSON beside the weights says "
                f"{config[name]!r}"
            )
    settings = dict(config) | {name: value for name, value in given.items() if value is not None}
    unknown = [name for name in given if name not in settings]
    if unknown:
        raise UserError(
            f"{path}: a state dict does not tell {' and '.join(unknown)}: put the JSON that came "
            f"with the weights beside them, or set "
            f"{' and '.join(f'config.teacher.{name}' for name in unknown)}"
        )
    if settings["activation"] not in ACTIVATIONS:
        raise UserError(
            f"{path}: activation {settings['activation']!r} is none of {', '.join(ACTIVATIONS)}"
        )
    names = {entry.path: entry.name for entry in reversed(entries_of(1))}
    needed = ("patch_embed/kernel", "positions", "proj/kernel", "blocks/mlp/fc1/bias")
    missing = [names[leaf] for leaf in needed if names[leaf] not in state]
    if missing:
        raise UserError(f"{path}: missing {', '.join(missing)}")
    kernel, positions, projection, hidden = (state[names[leaf]] for leaf in needed)
    width, _, patch, _ = kernel.shape
    last = names["blocks/mlp/fc1/bias"].split(".0.")
    depth = sum(name.startswith(f"{last[0]}.") and name.endswith(f".{last[1]}") for name in state)
    if width % settings["heads"]:
        raise UserError(f"{path}: {settings['heads']} heads do not divide the width {width}")
    is_openclip = entries_of is openclip_entries
    return Tower(
        image_size=patch * round((len(positions) - 1) ** 0.5),
        patch=patch,
        width=width,
        depth=depth,
        heads=settings["heads"],
        mlp_width=len(hidden),
        out_width=projection.shape[1] if is_openclip else projection.shape[0],
        activation=settings["activation"],
        eps=settings.get("eps", 1e-5),
        mean=settings.get("mean", CLIP_MEAN),
        std=settings.get("std", CLIP_STD),
    )
