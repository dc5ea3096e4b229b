"""What the file of a teacher tells, whatever its layout: convert/{clip,siglip,dinov2}.py make one.

A state dict does not tell the head count, nor always the activation. They come from the JSON beside
the weights or from the caller, never from a guess.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dgpt_jax.convert.layout import Entry
from dgpt_jax.schema import UserError

KNOWN = (
    "OpenAI's and OpenCLIP's CLIP ViT (visual.*); of Hugging Face CLIPModel, "
    "CLIPVisionModelWithProjection, SiglipModel, SiglipVisionModel, Dinov2Model and "
    "Dinov2WithRegistersModel"
)
# Ours by Hugging Face's names, where they differ.
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class Source:
    """A tower as it is published.

    state: its arrays, and no others. entries: the table of names for a depth. fields: those of
    towers.Tower that the layout settles, or that it has unless the JSON tells otherwise. told: what
    the JSON beside the weights, or the arrays, say of heads, activation, eps, mean, std and
    image_size. antialias: how the layout's own code resizes positions.
    """

    state: Mapping[str, np.ndarray]
    entries: Callable[[int], list[Entry]]
    fields: Mapping = field(default_factory=dict)
    told: Mapping = field(default_factory=dict)
    antialias: bool = False


def refusal(path, why: str) -> UserError:
    """The error for weights that are no teacher's."""
    return UserError(f"{path} {why}. Layouts that are known: {KNOWN}")


def read_json(path: Path) -> dict:
    """A JSON file. Raises UserError."""
    try:
        return json.loads(path.read_text())
    except ValueError as e:
        raise UserError(f"{path} is no JSON: {e}") from None


def hugging_face(directory: Path, *, activation: str, eps: float) -> dict:
    """`told` of config.json and preprocessor_config.json; nothing where there is no config.json.

    Hugging Face leaves out values that equal its class's defaults: 12 heads, the given activation
    (by its name) and eps.
    """
    config, preprocess = directory / "config.json", directory / "preprocessor_config.json"
    if not config.is_file():
        return {}
    content = read_json(config)
    vision = content.get("vision_config", content)
    activation = vision.get("hidden_act", activation)
    told = {
        "heads": vision.get("num_attention_heads", 12),
        "activation": ACTIVATIONS.get(activation, activation),
        "eps": vision.get("layer_norm_eps", eps),
    }
    if "image_size" in vision:
        told["image_size"] = vision["image_size"]
    if preprocess.is_file():
        content = read_json(preprocess)
        names = (("mean", "image_mean"), ("std", "image_std"))
        told |= {ours: tuple(content[hf]) for ours, hf in names if hf in content}
    return told


def part(state: Mapping, *prefixes: str) -> dict:
    """The arrays whose names begin with one of the prefixes, without it."""
    return {
        name.removeprefix(prefix): array
        for name, array in state.items()
        for prefix in prefixes
        if name.startswith(prefix)
    }
