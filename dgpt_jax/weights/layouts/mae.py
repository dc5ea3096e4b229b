"""Encoder of MAE's checkpoints (`models_mae.py`), which norms all tokens."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dgpt_jax.errors import UserError
from dgpt_jax.weights import mapping
from dgpt_jax.weights.layouts import timm
from dgpt_jax.weights.types import WeightLayout, Weights, assumption_note, encoder_shapes

DECODER = ("decoder_", "mask_token")
# Head counts of the three official models by width.
HEADS = {768: 12, 1024: 16, 1280: 16}


def read(
    state: Mapping[str, np.ndarray],
    path: Path,
    heads: int | None = None,
    decoder_heads: int | None = None,
) -> Weights:
    """The encoder; a decoder is dropped, with a note. Raises UserError."""
    if "norm.weight" not in state or "patch_embed.proj.weight" not in state:
        raise UserError(f"{path} is not an MAE encoder: patch_embed.proj or norm is missing")
    heads = heads or HEADS.get(state["norm.weight"].size)
    model = timm.model_of(state, {}, heads, path)
    notes = assumption_note(path, ("mean", "std"), "ImageNet's, as in MAE's own code")
    if any(name.startswith(DECODER) for name in state):
        notes += (f"{path}: dropped MAE's decoder",)
    table = timm.entries(model.depth, "cls", head=False)
    shapes = encoder_shapes(model, "cls", 0)
    params = mapping.read(table, state, shapes, ignore=DECODER, what=str(path))
    return Weights(model, params, "cls", str(path), notes=notes)


LAYOUT = WeightLayout(
    "mae",
    detect=lambda state, path: (
        state is not None and "decoder_embed.weight" in state and "mask_token" in state
    ),
    read=read,
    table=lambda weights: timm.entries(weights.model.depth, "cls", head=False),
)
