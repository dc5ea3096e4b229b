"""Plain vision transformers of timm as teachers: OpenCLIP's towers with a timm trunk.

The teacher's tokens are all tokens after the final norm, and after the linear projection if there
is one (OpenCLIP's `head.proj`, or timm's head after token pooling). Attention pooling is dropped.
JSON must name the architecture: timm's rotary ViTs have the same arrays.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dgpt_jax.errors import UserError
from dgpt_jax.weights import mean_std, plain_vit, positions, timm_towers
from dgpt_jax.weights.source import Source, strip_prefix, unsupported

FAMILIES = ("vit", "clip", "siglip")
RULES = ((r"^fc_norm\.", "norm."),)


def source(state: Mapping[str, np.ndarray], path: Path) -> Source | None:
    """Tower in timm's names, alone or in OpenCLIP's file; None for other arrays.

    Raises UserError without an architecture, and on pooling that is no projection of tokens.
    """
    trunk = strip_prefix(state, "visual.trunk.")
    names = trunk or state
    if "blocks.0.attn.qkv.weight" not in names or "pos_embed" not in names:
        return None
    tower = timm_towers.read(path.parent)
    settings = dict(timm_towers.require_family(tower, FAMILIES, path))
    if tower.family is None:
        raise unsupported(
            path,
            "has the arrays of a ViT by timm, but no JSON beside it names its architecture "
            "(config.json or open_clip_config.json)",
        )
    arrays = plain_vit.rename(trunk or dict(state), RULES)
    plain_vit.drop(arrays, ("attn_pool.",))
    head = strip_prefix(state, "visual.head.")
    if head and "proj.weight" not in head:
        raise UserError(f"{path}: OpenCLIP's head {', '.join(sorted(head))} is not linear")
    if not trunk:
        plain_vit.drop(arrays, ("head.",))  # of a classifier
    for name in ("weight", "bias"):
        if f"proj.{name}" in head:
            arrays[f"head.{name}"] = head[f"proj.{name}"]
    expected = tower.expected if "head.weight" in arrays else {}
    plain_vit.separate_prefix_positions(arrays)
    return plain_vit.source(
        arrays, path, gated=False, settings=settings | mean_std.read(path.parent), defaults={},
        expected=expected, resize=positions.bicubic_antialiased,
    )  # fmt: skip
