"""Mean and std of a teacher's input images in [0, 1], from JSON beside its weights.

No weight layout stores them. Without JSON a layout may determine them: OpenAI's own files
(`clip.py` there normalizes alike for all its models) and SigLIP (0.5 is the default of
transformers' SiglipImageProcessor, and big_vision's [-1, 1]). OpenCLIP's models and fine-tuned CLIP
and DINOv2 differ: those of laion2b's ViT-L/14 are 0.5, RAD-DINO's 0.53.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dgpt_jax.errors import UserError
from dgpt_jax.weights.config_json import (
    format_value,
    get_object,
    is_timm,
    read_json,
    read_mean_std,
    require_values,
)

TOLERANCE = 1e-4  # for values in two files to agree

MeanStd = dict[str, tuple[float, float, float]]


def read(directory: Path) -> MeanStd:
    """{"mean", "std"}, as far as the JSON files of a directory specify them.

    Raises UserError on invalid values, and on files that disagree.
    """
    result: dict[str, tuple] = {}
    for file, reader in READERS.items():
        path = directory / file
        if not path.is_file():
            continue
        for name, value in reader(read_json(path), path).items():
            previous, origin = result.setdefault(name, (value, path))
            if not same(value, previous):
                raise UserError(
                    f"{name} is {previous} in {origin}, {value} in {path}: remove the file that is "
                    f"not of these weights"
                )
    return {name: value for name, (value, _) in result.items()}


def same(a: Any, b: Any) -> bool:
    """True if two means, or two stds, agree."""
    return np.allclose(a, b, rtol=0, atol=TOLERANCE)


def timm_preprocess(content: Mapping, file: Path) -> dict[str, Any]:
    """timm's `pretrained_cfg`; early versions have its keys at the top of the file."""
    if "pretrained_cfg" in content:
        return get_object(content, "pretrained_cfg", file)
    return dict(content)


def _open_clip(content: Mapping, file: Path) -> MeanStd:
    preprocess = get_object(content, "preprocess_cfg", file)
    require_values(preprocess, {"mode": "RGB"}, file)
    return read_mean_std(preprocess, "mean", "std", file)


def _timm(content: Mapping, file: Path) -> MeanStd:
    preprocess = timm_preprocess(content, file) if is_timm(content) else {}
    return read_mean_std(preprocess, "mean", "std", file)


def _processor(content: Mapping, file: Path) -> MeanStd:
    """The image processor within transformers 5's processor of text and images."""
    return image_processor(get_object(content, "image_processor", file), file)


def image_processor(content: Mapping, file: Path) -> MeanStd:
    """{"mean", "std"} of transformers' image processor, as far as specified. Raises UserError."""
    if content.get("do_normalize") is False:
        return {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    factor = content.get("rescale_factor", 1 / 255)
    if type(factor) not in (int, float) or not np.isclose(factor, 1 / 255, rtol=1e-3):
        raise UserError(f"{file}: rescale_factor is {format_value(factor)}, supported is 1/255")
    require_values(content, {"do_rescale": True, "do_flip_channel_order": False}, file)
    return read_mean_std(content, "image_mean", "image_std", file)


READERS = {
    "open_clip_config.json": _open_clip,
    "processor_config.json": _processor,
    "preprocessor_config.json": image_processor,
    "config.json": _timm,
}
