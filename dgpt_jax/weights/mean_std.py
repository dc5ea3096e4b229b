"""Mean and std of a teacher's pictures, from whichever JSON beside its weights tells them.

They are of pictures in [0, 1]. No layout of arrays holds them. Where no JSON tells them, a layout
may: OpenAI's own files (`clip.py` there normalises all its models alike) and SigLIP (0.5 is what
transformers' SiglipImageProcessor is made with, and big_vision's [-1, 1]). OpenCLIP's models and
fine-tuned CLIP and DINOv2 have several: those of laion2b's ViT-L/14 are 0.5, RAD-DINO's 0.53.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dgpt_jax.convert.json_files import (
    group,
    is_timm,
    mean_std,
    read_json,
    refuse_unusual,
    shown,
)
from dgpt_jax.schema import UserError

TOLERANCE = 1e-4  # within which two files say the same


def told(directory: Path) -> dict:
    """{"mean", "std"}, what of them the JSON files of a directory tell.

    Raises UserError where they are no such numbers, or differ between two files.
    """
    found: dict[str, tuple] = {}
    for name, read in READERS.items():
        path = directory / name
        if not path.is_file():
            continue
        for what, value in read(read_json(path), path).items():
            other, where = found.setdefault(what, (value, path))
            if not same(value, other):
                raise UserError(
                    f"{where} says {what} {other}, {path} {value}: remove the one that is not of "
                    f"these weights"
                )
    return {what: value for what, (value, _) in found.items()}


def same(one, other) -> bool:
    """Whether two means, or two stds, say the same."""
    return np.allclose(one, other, rtol=0, atol=TOLERANCE)


def timm_preprocess(content: Mapping, file) -> dict:
    """timm's `pretrained_cfg`; files of its first versions have its keys at the top."""
    return group(content, "pretrained_cfg", file) if "pretrained_cfg" in content else dict(content)


def _open_clip(content: Mapping, file) -> dict:
    preprocess = group(content, "preprocess_cfg", file)
    refuse_unusual(preprocess, {"mode": "RGB"}, file)
    return mean_std(preprocess, "mean", "std", file)


def _timm(content: Mapping, file) -> dict:
    preprocess = timm_preprocess(content, file) if is_timm(content) else {}
    return mean_std(preprocess, "mean", "std", file)


def _processor(content: Mapping, file) -> dict:
    """transformers 5 keeps the image processor within the processor of text and images."""
    return image_processor(group(content, "image_processor", file), file)


def image_processor(content: Mapping, file) -> dict:
    """{"mean", "std"} of an image processor of transformers, what of them it tells."""
    if content.get("do_normalize") is False:
        return {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    factor = content.get("rescale_factor", 1 / 255)
    if type(factor) not in (int, float) or not np.isclose(factor, 1 / 255, rtol=1e-3):
        raise UserError(
            f"{file}: rescale_factor is {shown(factor)}, pictures here are divided by 255"
        )
    refuse_unusual(content, {"do_rescale": True, "do_flip_channel_order": False}, file)
    return mean_std(content, "image_mean", "image_std", file)


READERS = {
    "open_clip_config.json": _open_clip,
    "processor_config.json": _processor,
    "preprocessor_config.json": image_processor,
    "config.json": _timm,
}
