"""What the file of a teacher tells, whatever its layout: convert/{clip,siglip,dinov2}.py make one.

A state dict does not tell the head count, nor always the activation, nor mean and std. They come
from the JSON beside the weights or from the caller, never from a guess.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from dgpt_jax.convert.layout import Entry
from dgpt_jax.schema import UserError, printable

KNOWN = (
    "OpenAI's and OpenCLIP's CLIP ViT (visual.*); of Hugging Face CLIPModel, "
    "CLIPVisionModelWithProjection, SiglipModel, SiglipVisionModel, Dinov2Model and "
    "Dinov2WithRegistersModel"
)
SHOWN = 5  # names of arrays in a message


@dataclass(frozen=True)
class Source:
    """A tower as it is published.

    state: its arrays, and no others. entries: the table of names for a depth. fields: those of
    towers.Tower that the layout settles, or that it has unless the JSON tells otherwise. told: what
    the JSON beside the weights, or the arrays, say of heads, activation, eps, mean, std and
    image_size. claims: what the JSON says of sizes that the arrays have, by Tower's names, each
    with where it says so. antialias: how the layout's own code resizes positions.
    """

    state: Mapping[str, np.ndarray]
    entries: Callable[[int], list[Entry]]
    fields: Mapping = field(default_factory=dict)
    told: Mapping = field(default_factory=dict)
    claims: Mapping = field(default_factory=dict)
    antialias: bool = False


def refusal(path, why: str) -> UserError:
    """The error for weights that are no teacher's."""
    return UserError(f"{path} {why}. Layouts that are known: {KNOWN}")


def first_names(state: Mapping) -> str:
    """The first names of arrays, for a message."""
    names = ", ".join(printable(name)[:60] for name in list(state)[:SHOWN])
    return f"the first of its {len(state)} arrays are {names}"


def part(state: Mapping, *prefixes: str) -> dict:
    """The arrays whose names begin with one of the prefixes, without it."""
    return {
        name.removeprefix(prefix): array
        for name, array in state.items()
        for prefix in prefixes
        if name.startswith(prefix)
    }
