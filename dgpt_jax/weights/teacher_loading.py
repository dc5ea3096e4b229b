"""Loading of teacher weights in any supported layout (source.SUPPORTED)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dgpt_jax.config import TeacherConfig
from dgpt_jax.data.normalization import CLIP_MEAN, CLIP_STD
from dgpt_jax.errors import UserError
from dgpt_jax.models.teacher_vit import TeacherArchitecture, TeacherViT
from dgpt_jax.models.transformer import ACTIVATIONS
from dgpt_jax.weights import files, hub, mapping, mean_std, open_clip_json
from dgpt_jax.weights.config_json import check_sizes, is_timm, read_json
from dgpt_jax.weights.layouts import (
    aimv2,
    clip,
    dinov2,
    dinov3,
    eva,
    radio,
    siglip,
    timm_vit,
)
from dgpt_jax.weights.source import Source, first_names, unsupported

FILES = (
    "model.safetensors",
    files.INDEX,
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Each returns None for other layouts; in this order, since names of CLIP and SigLIP overlap.
LAYOUTS = (
    radio.tips, eva.eva02, eva.perception_encoder, timm_vit.source, clip.openclip, clip.hf,
    siglip.source, dinov2.source, dinov3.hugging_face, dinov3.original, dinov3.timm, aimv2.source,
    radio.radio,
)  # fmt: skip


@dataclass(frozen=True)
class Loaded:
    """A teacher: architecture, nested float32 parameters, name, weight hash, notes to print."""

    tower: TeacherArchitecture
    params: dict[str, Any]
    name: str
    hash: str
    notes: tuple[str, ...]


def load(
    weights: Path | str,
    *,
    image_size: int | None = None,
    heads: int | None = None,
    activation: str | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Loaded:
    """Loads the teacher in a weights file (files.read), in a directory with one of FILES, or of
    hf:ORG/NAME (hub.fetch).

    An `image_size` other than the weights' interpolates the positions. Raises UserError on
    unsupported layouts, missing or unknown arrays, missing or contradicting settings.
    """
    named = hub.fetch(weights, FILES) if hub.is_name(weights) else None
    state, path, notes = files.read(named.path if named else _find(Path(weights)))
    assert state is not None
    overrides = {"heads": heads, "activation": activation, "mean": mean, "std": std}
    overrides = {name: value for name, value in overrides.items() if value is not None}
    try:
        source = _source(state, path)
        tower = _tower(source, overrides, path, image_size)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as e:
        # Sizes are read off arrays before they are compared with the table.
        raise UserError(f"{path} is not a teacher's weights: {type(e).__name__} {e}") from e
    defaulted = [name for name in ("mean", "std") if name not in {**source.settings, **overrides}]
    notes += tuple(
        f"{path}: no JSON beside it specifies {name}: using its layout's, {getattr(tower, name)}"
        for name in defaulted
    )
    entries = source.entries(tower.depth)
    flat = mapping.read(entries, source.state, parameter_shapes(tower), what=str(path))
    if image_size is not None and image_size != tower.image_size:
        old, tower = tower, replace(tower, image_size=image_size)
        if tower.grid != old.grid:
            if image_size % tower.patch:
                raise UserError(
                    f"config.teacher.image_size {image_size} is not a multiple of the patch size "
                    f"{tower.patch}"
                )
            if tower.positions:
                flat["positions"] = source.resize(flat["positions"], tower.grid, tower.cls)
                notes += (
                    f"{path}: positions interpolated from {old.image_size} to {image_size} pixels",
                )
    file, _ = files.split(path)
    name = file.parent.name if file.name in FILES else file.stem
    name = named.name if named else name
    return Loaded(tower, mapping.unflatten(flat), name, files.hash_state(source.state), notes)


def load_configured(config: TeacherConfig) -> Loaded:
    """Loads the teacher of a config. Raises UserError."""
    return load(
        config.weights,
        image_size=config.image_size,
        heads=config.heads,
        activation=config.activation,
        mean=config.mean,
        std=config.std,
    )


def parameter_shapes(tower: TeacherArchitecture) -> dict[str, tuple[int, ...]]:
    """{path: shape} of a teacher's parameters."""
    images = np.zeros((1, tower.image_size, tower.image_size, 3), np.float32)
    params = jax.eval_shape(TeacherViT(tower).init, jax.random.key(0), images)["params"]
    return {name: leaf.shape for name, leaf in mapping.flatten(params).items()}


def _find(path: Path) -> Path:
    """Weights file of a path: the first in FILES with JSON of its library, or the first."""
    if not path.is_dir():
        return path
    names = [name for name in FILES if (path / name).is_file()]
    if not names:
        raise UserError(f"{path} contains none of {', '.join(FILES)}")
    if len(names) == 1:
        return path / names[0]
    return path / next((name for name in names if _has_json(path, name)), names[0])


def _has_json(directory: Path, name: str) -> bool:
    """True if the directory has JSON by the library that wrote the file."""
    if name.startswith("open_clip"):
        return (directory / open_clip_json.FILE).is_file()
    config = directory / "config.json"
    return config.is_file() and not is_timm(read_json(config))


def _source(state: Mapping[str, np.ndarray], path: Path) -> Source:
    for find in LAYOUTS:
        if (source := find(state, path)) is not None:
            return source
    raise UserError(f"{unsupported(path, 'is not in a teacher layout')}; {first_names(state)}")


def _tower(
    source: Source, overrides: Mapping[str, Any], path: Path, image_size: int | None
) -> TeacherArchitecture:
    """Architecture by arrays, JSON and config; image_size: the requested one."""
    settings = _settings(source, overrides, path)
    table = {entry.path: entry for entry in reversed(source.entries(1))}
    leaves = ("patch_embed/kernel", "blocks/mlp/fc1/bias", "positions", "proj/kernel")
    required = [leaf for leaf in leaves if leaf in table or leaf in leaves[:2]]
    names = {leaf: table[leaf].name for leaf in required if leaf in table}
    missing = [names.get(leaf, leaf) for leaf in required if names.get(leaf) not in source.state]
    if missing:
        raise UserError(f"{path}: missing {', '.join(missing)}")
    arrays = {leaf: source.state[name] for leaf, name in names.items()}
    width, _, patch, _ = arrays["patch_embed/kernel"].shape
    prefix, suffix = names["blocks/mlp/fc1/bias"].split(".0.")
    depth = sum(n.startswith(f"{prefix}.") and n.endswith(f".{suffix}") for n in source.state)
    if width % settings["heads"]:
        raise UserError(f"{path}: {settings['heads']} heads do not divide the width {width}")
    projection = arrays.get("proj/kernel")
    out_axis = 0 if projection is not None and table["proj/kernel"].kind == "linear" else 1
    stated = settings.pop("image_size", None)
    if "positions" in arrays:
        side = round((arrays["positions"].shape[-2] - settings.get("cls", True)) ** 0.5)
        size = _image_size(stated, patch, side, image_size, path)
    elif (size := stated or image_size) is None:
        raise UserError(
            f"{path} has rotary positions alone, for any size of images, and no JSON beside it "
            f"states one: set {_config_keys(['image_size'])}"
        )
    hidden = len(arrays["blocks/mlp/fc1/bias"])
    tower = TeacherArchitecture(
        image_size=size,
        patch=patch,
        width=width,
        depth=depth,
        out_width=None if projection is None else projection.shape[out_axis],
        mlp_width=hidden // (2 if settings["activation"] == "swiglu" else 1),
        **settings,
    )
    check_sizes(source.expected, vars(tower), path)
    return tower


def _image_size(
    stated: int | None, patch: int, side: int, requested: int | None, path: Path
) -> int:
    """Image size of the positions: side · patch, or slightly more.

    stated: in the JSON, the only origin of a size that is not a multiple of the patch. Raises
    UserError if it is inconsistent with the positions and no size is requested.
    """
    if stated is None or stated // patch == side:
        return stated or patch * side
    if requested is None:
        raise UserError(
            f"{path}: the JSON beside it has image_size {stated}, the positions are for "
            f"{patch * side} pixels: config.teacher.image_size={stated} interpolates them, "
            f"config.teacher.image_size={patch * side} uses them unchanged"
        )
    return patch * side


def _settings(source: Source, overrides: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Fields of TeacherArchitecture: the layout's defaults, source settings, config overrides."""
    for name, value in overrides.items():
        stated = source.settings.get(name, value)
        if not (mean_std.same(stated, value) if isinstance(value, tuple) else stated == value):
            raise UserError(
                f"{path}: config.teacher.{name} is {value!r}, but the weights and the JSON beside "
                f"them have {stated!r}"
            )
    settings = {**source.defaults, **source.settings, **overrides}
    if missing := [name for name in ("heads", "activation") if name not in settings]:
        raise UserError(
            f"{path}: a state dict does not store {' and '.join(missing)}: put the JSON that came "
            f"with the weights beside them, or set {_config_keys(missing)}"
        )
    if settings["activation"] not in ACTIVATIONS:
        raise UserError(
            f"{path}: activation {settings['activation']!r} is none of {', '.join(ACTIVATIONS)}"
        )
    if missing := [name for name in ("mean", "std") if name not in settings]:
        raise UserError(
            f"{path}: neither the weights nor JSON beside them specify the images' "
            f"{' and '.join(missing)}: put the JSON that came with the weights "
            f"(preprocessor_config.json, open_clip_config.json) beside them, or set "
            f"{_config_keys(missing)} (OpenAI's CLIP has mean {CLIP_MEAN}, std {CLIP_STD})"
        )
    return settings


def _config_keys(names: list[str]) -> str:
    """Keys for commands with --config, and flags of those without."""
    keys, flags = (" and ".join(f"{p}{name}" for name in names) for p in ("config.teacher.", "--"))
    return f"{keys} (without --config: {flags})"
