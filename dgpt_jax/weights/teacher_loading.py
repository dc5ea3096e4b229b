"""Opens a teacher's weights, in whichever of the known layouts they are (source.KNOWN)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

from dgpt_jax.convert import clip, dinov2, files, layout, normalisation, open_clip, siglip
from dgpt_jax.convert.json_files import check_claims, is_timm, read_json
from dgpt_jax.convert.source import Source, first_names, refusal
from dgpt_jax.schema import UserError
from dgpt_jax.sections import Teacher
from dgpt_jax.towers import CLIP_MEAN, CLIP_STD, TeacherTower, Tower
from dgpt_jax.transformer import ACTIVATIONS

FILES = (
    "model.safetensors",
    files.INDEX,
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
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
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Loaded:
    """The teacher in a weights file (files.read), or in a directory with one of FILES.

    `image_size` other than the weights' interpolates the positions. Raises UserError on layouts
    that are not known, missing or unknown arrays, unknown or contradicting settings.
    """
    state, path, notes = files.read(_find(Path(weights)))
    given = {"heads": heads, "activation": activation, "mean": mean, "std": std}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        source = _source(state, path)
        tower = _tower(source, given, path, image_size)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as e:
        # Sizes are taken from arrays before their table is compared with them.
        raise UserError(f"{path} is no teacher's weights: {type(e).__name__} {e}") from e
    usual = [name for name in ("mean", "std") if name not in {**source.told, **given}]
    notes += tuple(
        f"{path}: no JSON beside it tells {name}: that of its layout is taken, "
        f"{getattr(tower, name)}"
        for name in usual
    )
    entries = source.entries(tower.depth)
    flat = layout.read(entries, source.state, parameter_shapes(tower), what=str(path))
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
            notes += (
                f"{path}: positions interpolated from {old.image_size} to {image_size} pixels",
            )
    file, _ = files.split(path)
    name = file.parent.name if file.name in FILES else file.stem
    return Loaded(tower, layout.unflatten(flat), name, files.hash_state(source.state), notes)


def load_configured(settings: Teacher) -> Loaded:
    """The teacher that a config names. Raises UserError."""
    return load(
        settings.weights,
        image_size=settings.image_size,
        heads=settings.heads,
        activation=settings.activation,
        mean=settings.mean,
        std=settings.std,
    )


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
    """The file of weights: of several, the first beside which the JSON of its kind lies."""
    if not path.is_dir():
        return path
    there = [name for name in FILES if (path / name).is_file()]
    if not there:
        raise UserError(f"{path} holds none of {', '.join(FILES)}")
    if len(there) == 1:
        return path / there[0]
    return path / next((name for name in there if _is_described(path, name)), there[0])


def _is_described(directory: Path, name: str) -> bool:
    """Whether the JSON for a file of FILES lies beside it: OpenCLIP's, or Hugging Face's."""
    if name.startswith("open_clip"):
        return (directory / open_clip.FILE).is_file()
    config = directory / "config.json"
    return config.is_file() and not is_timm(read_json(config))


def _source(state: Mapping, path: Path) -> Source:
    for find in LAYOUTS:
        if (source := find(state, path)) is not None:
            return source
    raise UserError(f"{refusal(path, 'is in no layout of a teacher')}; {first_names(state)}")


def _tower(source: Source, given: Mapping, path: Path, asked: int | None) -> Tower:
    """The tower of a source, with what only JSON and caller know; asked: the image size."""
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
    before, after = needed[2].split(".0.")
    depth = sum(n.startswith(f"{before}.") and n.endswith(f".{after}") for n in source.state)
    if width % settings["heads"]:
        raise UserError(f"{path}: {settings['heads']} heads do not divide the width {width}")
    tower = Tower(
        image_size=_image_size(settings.pop("image_size", None), patch, side, asked, path),
        patch=patch,
        width=width,
        depth=depth,
        out_width=proj[0].shape[out_axis] if proj else None,
        mlp_width=len(hidden) // (2 if settings["activation"] == "swiglu" else 1),
        **settings,
    )
    check_claims(source.claims, vars(tower), path)
    return tower


def _image_size(told: int | None, patch: int, side: int, asked: int | None, path: Path) -> int:
    """Pixels along the image that the positions are of, side · patch or a little more.

    told: by the JSON, which alone knows it where patches do not fill the image. Raises UserError
    where it is another size and none is asked for.
    """
    if told is None or told // patch == side:
        return told or patch * side
    if asked is None:
        raise UserError(
            f"{path}: the JSON beside it has image_size {told}, the positions are those of "
            f"{patch * side} pixels: config.teacher.image_size={told} interpolates them, "
            f"config.teacher.image_size={patch * side} takes them as they are"
        )
    return patch * side


def _settings(source: Source, given: Mapping, path: Path) -> dict:
    """Fields of Tower from the layout, from what came with the weights and from the caller."""
    for name, value in given.items():
        told = source.told.get(name, value)
        if not (normalisation.same(told, value) if isinstance(value, tuple) else told == value):
            raise UserError(
                f"{path}: config.teacher.{name} is {value!r}, the weights and the JSON beside "
                f"them say {told!r}"
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
    unknown = [name for name in ("mean", "std") if name not in settings]
    if unknown:
        raise UserError(
            f"{path}: neither the weights nor JSON beside them tell {' and '.join(unknown)} of the "
            f"pictures: put the JSON that came with the weights (preprocessor_config.json, "
            f"open_clip_config.json) beside them, or set "
            f"{' and '.join(f'config.teacher.{name}' for name in unknown)} (OpenAI's CLIP has mean "
            f"{CLIP_MEAN}, std {CLIP_STD})"
        )
    return settings
