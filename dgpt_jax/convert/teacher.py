"""Opens a teacher's weights, in whichever of the known layouts they are (source.KNOWN)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

from dgpt_jax.convert import clip, dinov2, files, layout, siglip
from dgpt_jax.convert.source import Source, refusal
from dgpt_jax.schema import UserError
from dgpt_jax.towers import TeacherTower, Tower
from dgpt_jax.transformer import ACTIVATIONS

FILES = (
    "model.safetensors",
    files.INDEX,
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
)
# Each tells whether a state dict is of its layout; the names of CLIP and SigLIP overlap.
LAYOUTS = (clip.openclip, clip.hf, siglip.source, dinov2.source)


@dataclass(frozen=True)
class Loaded:
    """A teacher: its tower, nested float32 parameters, name and weight hash, remarks to print."""

    tower: Tower
    params: dict
    name: str
    hash: str
    notes: tuple[str, ...]


def load(
    weights: str,
    *,
    image_size: int | None = None,
    heads: int | None = None,
    activation: str | None = None,
) -> Loaded:
    """The teacher in a weights file, or in a directory with one of FILES.

    `image_size` other than the weights' interpolates the positions. Raises UserError on layouts
    that are not known, missing or unknown arrays, unknown or contradicting settings.
    """
    path = _find(Path(weights))
    source = _source(files.read_state(path.parent if path.name == files.INDEX else path), path)
    given = {"heads": heads, "activation": activation}
    tower = _tower(source, given, path)
    entries = source.entries(tower.depth)
    flat = layout.read(entries, source.state, parameter_shapes(tower), what=str(path))
    notes = ()
    if image_size is not None and image_size != tower.image_size:
        old, tower = tower, replace(tower, image_size=image_size)
        if tower.grid != old.grid:
            if image_size % tower.patch:
                raise UserError(
                    f"image_size {image_size} is no multiple of the patch {tower.patch}"
                )
            flat["positions"] = interpolate_positions(
                flat["positions"], tower.grid, cls=tower.cls, antialias=source.antialias
            )
            notes = (
                f"{path}: positions interpolated from {old.image_size} to {image_size} pixels",
            )
    name = path.parent.name if path.name in FILES else path.stem
    return Loaded(tower, layout.unflatten(flat), name, files.hash_state(source.state), notes)


def parameter_shapes(tower: Tower) -> dict[str, tuple[int, ...]]:
    """{path: shape} of a tower's parameters."""
    images = np.zeros((1, tower.image_size, tower.image_size, 3), np.float32)
    params = jax.eval_shape(TeacherTower(tower).init, jax.random.key(0), images)["params"]
    return {name: leaf.shape for name, leaf in layout.flatten(params).items()}


def interpolate_positions(
    positions: np.ndarray, grid: tuple[int, int], *, cls: bool, antialias: bool
) -> np.ndarray:
    """(cls+N, D) to (cls+rows·cols, D) as torch's bicubic does, pixel centres aligned.

    CLS is kept. Torch takes another bicubic kernel where it antialiases.
    """
    side = round((len(positions) - cls) ** 0.5)
    width = positions.shape[1]
    table = positions[int(cls) :].reshape(side, side, width)
    kernel = "cubic" if antialias else "cubic-pytorch"
    table = jax.image.resize(table, (*grid, width), kernel, antialias=antialias)
    return np.concatenate([positions[: int(cls)], np.asarray(table).reshape(-1, width)])


def _find(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in FILES:
        if (path / name).is_file():
            return path / name
    raise UserError(f"{path} holds none of {', '.join(FILES)}")


def _source(state: Mapping, path: Path) -> Source:
    for find in LAYOUTS:
        if (source := find(state, path)) is not None:
            return source
    raise refusal(path, "is in no layout of a teacher")


def _tower(source: Source, given: Mapping, path: Path) -> Tower:
    """The tower of a source, with what only JSON and caller know."""
    settings = _settings(source, given, path)
    table = {entry.path: entry for entry in reversed(source.entries(1))}
    sized = ("patch_embed/kernel", "positions", "blocks/mlp/fc1/bias", "proj/kernel")
    needed = [table[leaf].name for leaf in sized if leaf in table]
    missing = [name for name in needed if name not in source.state]
    if missing:
        raise UserError(f"{path}: missing {', '.join(missing)}")
    kernel, positions, hidden, *proj = (source.state[name] for name in needed)
    width, _, patch, _ = kernel.shape
    out_axis = 0 if proj and table["proj/kernel"].kind == "linear" else 1
    side = round((positions.shape[-2] - settings.get("cls", True)) ** 0.5)
    # Where patches do not fill the image, only the JSON knows its size.
    image_size = settings.pop("image_size", None)
    fits = isinstance(image_size, int) and image_size // patch == side
    before, after = needed[2].split(".0.")
    depth = sum(n.startswith(f"{before}.") and n.endswith(f".{after}") for n in source.state)
    if width % settings["heads"]:
        raise UserError(f"{path}: {settings['heads']} heads do not divide the width {width}")
    return Tower(
        image_size=image_size if fits else patch * side,
        patch=patch,
        width=width,
        depth=depth,
        out_width=proj[0].shape[out_axis] if proj else None,
        mlp_width=len(hidden) // (2 if settings["activation"] == "swiglu" else 1),
        **settings,
    )


def _settings(source: Source, given: Mapping, path: Path) -> dict:
    """Fields of Tower from the layout, from what came with the weights and from the caller."""
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if source.told.get(name, value) != value:
            raise UserError(
                f"{path}: config.teacher.{name} is {value!r}, the weights and the JSON beside "
                f"them say {source.told[name]!r}"
            )
    settings = {**source.fields, **source.told, **given}
    unknown = [name for name in ("heads", "activation") if name not in settings]
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
    return settings
