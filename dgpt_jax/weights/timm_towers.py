"""Settings of timm's vision towers that their arrays do not determine, by architecture name.

timm's config.json and OpenCLIP's JSON (`timm_model_name`) name the architecture and nothing else;
heads, activation and eps are in timm's code. A test compares all of them with timm's models.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dgpt_jax.errors import UserError
from dgpt_jax.weights.config_json import (
    files_with_object,
    format_value,
    get_object,
    is_timm,
    positive_int,
    read_json,
    refuse_unknown_keys,
    require_values,
)
from dgpt_jax.weights.open_clip_json import FILE as OPEN_CLIP

# Heads by the size in an architecture's name, and (pattern of the rest, eps) of each family.
HEADS = {
    "tiny": 3, "small": 6, "small_plus": 6, "base": 12, "large": 16, "so400m": 16, "huge": 16,
    "huge_plus": 20, "giant": 16, "giantopt": 16, "gigantic": 16,
}  # fmt: skip
SIZE = "(" + "|".join(sorted(HEADS, key=len, reverse=True)) + ")"
FAMILIES = {
    "dinov3": (rf"vit_{SIZE}_patch16_(?:dinov3(?:_qkvb)?|lingbot)", 1e-5),
    "pe_core": (rf"vit_pe_core_{SIZE}_patch\d+_\d+", 1e-5),
    "eva02": (rf"eva02_{SIZE}_patch\d+_(?:clip_)?\d+", 1e-6),
    "clip": (rf"vit_{SIZE}_patch\d+_clip_(?:quickgelu_)?\d+", 1e-5),
    "siglip": (rf"vit_{SIZE}_patch\d+_siglip_(?:gap_)?\d+", 1e-6),
    "vit": (rf"vit_{SIZE}_patch\d+_\d+", 1e-6),
}  # fmt: skip
# The number of heads follows no rule.
OTHER_HEADS = {"vit_giant_patch16_lingbot": 24}
TANH = (
    r"vit_(?:so400m_patch16|giantopt_patch16|base_patch32)_siglip_.*"
    r"|vit_large_patch16_siglip_(?:gap_)?512"
)
# Read in training, by a head, or for array shapes.
IGNORED = (
    "timm_model_pretrained", "timm_drop", "timm_drop_path", "timm_proj_bias", "patch_dropout",
    "width", "layers", "patch_size", "mlp_ratio", "head_width",
)  # fmt: skip
IGNORED_ARGS = ("img_size", "num_classes", "dynamic_img_size", "global_pool")


class TimmTower(NamedTuple):
    """What JSON beside weights says of a tower by timm: its family (of FAMILIES), settings and
    expected sizes as in source.Source, and how OpenCLIP's head pools and projects its tokens."""

    family: str | None
    settings: dict[str, Any]
    expected: dict[str, tuple[Any, str]]
    pool: str | None = None


def read(directory: Path) -> TimmTower:
    """Settings of the tower whose weights lie in `directory`; without JSON none.

    Raises UserError on an architecture outside FAMILIES, and on options that change the outputs.
    """
    file = directory / "config.json"
    content = read_json(file) if file.is_file() else {}
    if is_timm(content):
        arguments = get_object(content, "model_args", file)
        refuse_unknown_keys(arguments, IGNORED_ARGS, f"{file}: model_args")
        return TimmTower(*by_name(content.get("architecture"), file), {})
    file = directory / OPEN_CLIP
    if not file.is_file():
        file = next(iter(files_with_object(directory, "vision_cfg")), file)
    content = read_json(file) if file.is_file() else {}
    model = get_object(content, "model_cfg", file) or content
    vision = get_object(model, "vision_cfg", file)
    if not vision.get("timm_model_name"):
        return TimmTower(None, {}, {})
    known = ("timm_model_name", "timm_pool", "timm_proj", "timm_model_kwargs", "image_size")
    refuse_unknown_keys(vision, (*known, *IGNORED), file)
    require_values(vision, {"timm_model_kwargs": {}}, file)
    if vision.get("timm_proj") not in (None, "", "none", "linear"):
        raise UserError(f"{file}: timm_proj {format_value(vision['timm_proj'])} is not linear")
    family, settings = by_name(vision["timm_model_name"], file)
    if vision.get("image_size") is not None:
        settings["image_size"] = positive_int(vision["image_size"], f"{file}: image_size")
    expected = {}
    if model.get("embed_dim") is not None:
        expected["out_width"] = (model["embed_dim"], f"embed_dim in {file}")
    return TimmTower(family, settings, expected, vision.get("timm_pool"))


def by_name(architecture: Any, file: Path) -> tuple[str, dict[str, Any]]:
    """(family, {heads, eps, activation}) of an architecture's name, whose tag is ignored."""
    name = str(architecture).split(".")[0]
    for family, (pattern, eps) in FAMILIES.items():
        if match := re.fullmatch(pattern, name):
            settings = {"heads": OTHER_HEADS.get(name, HEADS[match[1]]), "eps": eps}
            if family in ("clip", "siglip", "vit"):  # the arrays of others show gated MLPs
                tanh = re.fullmatch(TANH, name)
                quick = "quick_gelu" if "quickgelu" in name else "gelu"
                settings["activation"] = "gelu_tanh" if tanh else quick
            return family, settings
    raise UserError(
        f"{file}: timm's {format_value(architecture)} is not a supported teacher: supported are "
        f"the plain ViTs of CLIP and SigLIP, EVA-02, PE-core and DINOv3"
    )


def require_family(tower: TimmTower, families: tuple[str, ...], path: Path) -> Mapping[str, Any]:
    """The settings of a tower. Raises UserError if the JSON names a tower of another family."""
    if tower.family is not None and tower.family not in families:
        raise UserError(
            f"{path}: the JSON beside it names a tower of the family {tower.family}, the arrays "
            f"have the names of {' or '.join(families)}"
        )
    return tower.settings
