"""EVA-02-CLIP and Perception Encoder towers: OpenCLIP's, timm's `Eva`, and the authors' own files.

The teacher's tokens are all tokens after the final norm, EVA-02-CLIP's also after the projection.
The Perception Encoder's attention pooling, with the projection after it, is dropped; its `spatial`
and `lang` models, whose arrays do not show their rotary positions, are not read.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dgpt_jax.models.rope import Rope
from dgpt_jax.weights import mean_std, plain_vit, positions, timm_towers
from dgpt_jax.weights.source import Source, strip_prefix, unsupported

# EVA-02 was pretrained at 16 x 16 patches, and scales the indices of other grids to them.
EVA_ROPE = Rope(theta=10_000.0, reference=16)
# By the prefix of all arrays of the tower: OpenCLIP's timm models, the authors' files, timm's.
PREFIXES = ("visual.trunk.", "visual.", "")
EVA_NAMES = (
    (r"\.attn\.inner_attn_ln\.", ".attn.norm."),
    (r"\.attn\.([qkv])_proj\.", r".attn.\1."),
    (r"\.attn\.([qv])_bias$", r".attn.\1.bias"),
    (r"\.mlp\.(?:fc1_g|w1)\.", ".mlp.gate."),
    (r"\.mlp\.(?:fc1_x|w2)\.", ".mlp.up."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
    (r"\.mlp\.ffn_ln\.", ".mlp.norm."),
)
PE_NAMES = (
    (r"^conv1\.", "patch_embed.proj."),
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^transformer\.resblocks\.", "blocks."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.ls_([12])\.gamma", r".ls\1.gamma"),
    (r"\.gamma_([12])$", r".ls\1.gamma"),
    (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


def eva02(state: Mapping[str, np.ndarray], path: Path) -> Source | None:
    """Tower of EVA-02-CLIP; None for other arrays. Raises UserError.

    EVA02-CLIP-E, with norms after attention and MLP, has none within them and is not read.
    """
    prefix = _prefix(state, ("blocks.0.mlp.ffn_ln.weight", "blocks.0.mlp.norm.weight"))
    if prefix is None:
        return None
    arrays = plain_vit.rename(strip_prefix(state, prefix), EVA_NAMES)
    plain_vit.drop(arrays, ("rope.", "mask_token"))
    for name in [name for name in arrays if ".rope." in name]:  # a copy of the table per block
        del arrays[name]
    if "blocks.0.attn.q.weight" not in arrays:
        raise unsupported(path, "is an EVA-02 whose q, k and v are one array")
    tower = timm_towers.read(path.parent)
    settings = timm_towers.require_family(tower, ("eva02",), path)
    plain_vit.separate_prefix_positions(arrays)
    return plain_vit.source(
        arrays, path, gated=True, settings={**settings, **mean_std.read(path.parent)},
        defaults={"eps": 1e-6, "rope": EVA_ROPE}, expected=tower.expected,
        resize=positions.bicubic_antialiased,
    )  # fmt: skip


def perception_encoder(state: Mapping[str, np.ndarray], path: Path) -> Source | None:
    """Tower of a Perception Encoder; None for other arrays. Raises UserError."""
    prefix = _prefix(state, ("attn_pool.probe", "attn_pool.latent"))
    if prefix is None or (
        f"{prefix}blocks.0.norm1.weight" not in state
        and (f"{prefix}transformer.resblocks.0.ln_1.weight" not in state)
    ):
        return None
    arrays = plain_vit.rename(strip_prefix(state, prefix), PE_NAMES)
    if "norm_pre.weight" not in arrays:
        return None  # SigLIP's pooling, in timm
    plain_vit.drop(arrays, ("attn_pool.", "proj", "head.", "rope."))
    settings = timm_towers.require_family(timm_towers.read(path.parent), ("pe_core",), path)
    table = arrays["pos_embed"]
    side = round((table.shape[-2] - ("cls_token" in arrays)) ** 0.5)
    rope = Rope(
        theta=10_000.0, reference=side, offset=float("cls_token" in arrays), columns_first=True
    )
    return plain_vit.source(
        arrays, path, gated=False, settings={**settings, **mean_std.read(path.parent)},
        defaults={"activation": "gelu", "eps": 1e-5, "rope": rope},
        resize=positions.bicubic_antialiased,
    )  # fmt: skip


def _prefix(state: Mapping[str, np.ndarray], names: tuple[str, ...]) -> str | None:
    """The first of PREFIXES before one of the names; None if no array has such a name."""
    return next((p for p in PREFIXES if any(f"{p}{name}" in state for name in names)), None)
