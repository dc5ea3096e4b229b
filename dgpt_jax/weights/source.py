"""Published weights of a teacher, before its settings are resolved.

A state dict stores neither the head count nor, in general, the activation, mean and std. They come
from JSON beside the weights, from the config or from the layout, and are never guessed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dgpt_jax.errors import UserError, printable
from dgpt_jax.weights import positions
from dgpt_jax.weights.mapping import ArrayEntry
from dgpt_jax.weights.positions import Resize

SUPPORTED = (
    "CLIP ViT of OpenAI and OpenCLIP (visual.*); EVA-02-CLIP, Perception Encoder (core) and plain "
    "ViTs of timm, alone or in OpenCLIP's files; DINOv3 of Meta and timm; AIMv2 of Apple; Hugging "
    "Face's CLIPModel, CLIPVisionModelWithProjection, SiglipModel, SiglipVisionModel, "
    "Siglip2VisionModel, Dinov2Model, Dinov2WithRegistersModel, DINOv3ViTModel, Aimv2VisionModel, "
    "RadioModel and Tipsv2VisionModel"
)
MAX_NAMES = 5  # array names in a message


@dataclass(frozen=True)
class Source:
    """A teacher's vision tower in a published layout (layouts/).

    state: the tower's arrays. entries: table of names for a depth. resize: of positions, as the
    layout's own code does it.

    The rest are settings by the field names of teacher_vit.TeacherArchitecture:
    defaults: of the layout. settings: heads, activation, eps, mean, std and image_size as the JSON
    beside the weights or the arrays specify them; they take precedence over `defaults`. (The
    config's `overrides` must agree with `settings`.) expected: sizes that the JSON states and the
    arrays determine, {name: (value, key and file)}; checked against the arrays.
    """

    state: Mapping[str, np.ndarray]
    entries: Callable[[int], list[ArrayEntry]]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    expected: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    resize: Resize = positions.bicubic


def unsupported(path: Path | str, reason: str) -> UserError:
    """Error for weights that are not in a supported teacher layout."""
    return UserError(f"{path} {reason}. Supported layouts: {SUPPORTED}")


def first_names(state: Mapping[str, np.ndarray]) -> str:
    """First array names, for a message."""
    names = ", ".join(printable(name)[:60] for name in list(state)[:MAX_NAMES])
    return f"the first of its {len(state)} arrays are {names}"


def strip_prefix(state: Mapping[str, np.ndarray], *prefixes: str) -> dict[str, np.ndarray]:
    """Arrays whose names start with one of the prefixes, by their names without it."""
    return {
        name.removeprefix(prefix): array
        for name, array in state.items()
        for prefix in prefixes
        if name.startswith(prefix)
    }
