"""DINOv3 ViTs as published by Meta, by Hugging Face and by timm.

The teacher's tokens are CLS and patches after the final norm, without registers. Of the models with
an untied norm for CLS (7B) only training reads the second norm.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dgpt_jax.errors import UserError
from dgpt_jax.models.rope import Rope
from dgpt_jax.weights import hf_json, mean_std, plain_vit, timm_towers
from dgpt_jax.weights.source import Source, unsupported

THETA = 100.0
ROPE = Rope(theta=THETA, centered=True, interleaved=False)
DEFAULTS = {"eps": 1e-5, "rope": ROPE}
# {model_type: default eps} of Hugging Face's models with these names.
TYPES = {"dinov3_vit": 1e-5}
# Keys that only training reads, and those that the arrays determine.
ANY = (
    "key_bias", "mlp_bias", "proj_bias", "query_bias", "value_bias", "use_gated_mlp",
    "pos_embed_jitter", "pos_embed_rescale", "pos_embed_shift",
)  # fmt: skip
HUGGING_FACE = (
    (r"^(dinov3_vit\.|model\.)?(model\.)?layer\.", "blocks."),
    (r"^(?:dinov3_vit\.|model\.)?embeddings\.", "embeddings."),
    (r"^(?:dinov3_vit\.|model\.)?norm\.", "norm."),
    (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^embeddings\.register_tokens", "reg_token"),
    (r"^embeddings\.", ""),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1", r".ls\1.gamma"),
    (r"\.mlp\.gate_proj\.", ".mlp.gate."),
    (r"(blocks\.\d+\.mlp)\.up_proj\.", r"\1.fc1."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
)
ORIGINAL = (
    (r"^(?:module\.|backbone\.|teacher\.)+", ""),
    (r"^storage_tokens", "reg_token"),
    (r"\.mlp\.w1\.", ".mlp.gate."),
    (r"\.mlp\.w2\.", ".mlp.up."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)
TIMM = (
    (r"\.gamma_([12])$", r".ls\1.gamma"),
    (r"\.mlp\.fc1_g\.", ".mlp.gate."),
    (r"\.mlp\.fc1_x\.", ".mlp.up."),
    (r"\.attn\.([qkv])_bias$", r".attn.\1.bias"),
)


def hugging_face(state: Mapping[str, np.ndarray], path: Path) -> Source | None:
    """Tower of a DINOv3ViTModel; None for other arrays. Raises UserError."""
    if not any(".layer_scale1." in n for n in state) or not any(
        n.endswith("attention.q_proj.weight") for n in state
    ):
        return None
    arrays = plain_vit.rename(state, HUGGING_FACE)
    if "reg_token" not in arrays or "pos_embed" in arrays or "position_embeddings" in arrays:
        return None
    gated = any(".mlp.gate." in name for name in arrays)
    if gated:
        arrays = plain_vit.rename(arrays, [(r"\.mlp\.fc1\.", ".mlp.up.")])
    plain_vit.drop(arrays, ("mask_token", "rope_embeddings."))
    settings, expected = hf_json.config(
        path.parent, TYPES, activation="gelu", values={"rope_theta": THETA}, any_of=ANY
    )
    return plain_vit.source(
        arrays, path, gated=gated, settings=settings | mean_std.read(path.parent),
        defaults={"activation": "gelu", **DEFAULTS}, expected=expected,
    )  # fmt: skip


def original(state: Mapping[str, np.ndarray], path: Path) -> Source | None:
    """Tower in Meta's own files; None for other arrays. Raises UserError."""
    if not any(name.endswith("storage_tokens") for name in state):
        return None
    arrays = plain_vit.rename(state, ORIGINAL)
    if any(name.startswith("cls_norm.") for name in arrays):
        raise unsupported(path, "has a norm of its own for CLS")
    periods = arrays.pop("rope_embed.periods", None)
    if periods is None:
        raise unsupported(path, "has storage tokens, but no rope_embed.periods")
    _check_periods(periods, path)
    for name in [name for name in arrays if name.endswith(".attn.qkv.bias_mask")]:
        _mask_key_bias(arrays, name, path)
    plain_vit.drop(arrays, ("mask_token", "local_cls_norm.", "dino_head.", "ibot_head."))
    width = arrays["cls_token"].shape[-1]
    return plain_vit.source(
        arrays, path, gated=any(".mlp.gate." in name for name in arrays),
        settings={"heads": width // (4 * periods.size)} | mean_std.read(path.parent),
        defaults={"activation": "gelu", **DEFAULTS},
    )  # fmt: skip


def timm(state: Mapping[str, np.ndarray], path: Path) -> Source | None:
    """Tower of timm's DINOv3 models; None for other arrays."""
    if "reg_token" not in state or "pos_embed" in state or "blocks.0.gamma_1" not in state:
        return None
    arrays = plain_vit.rename(state, TIMM)
    for name in [name for name in arrays if name.endswith(".attn.q.bias")]:
        plain_vit.join_query_value_bias(arrays, name.removesuffix(".q.bias"))
    settings = timm_towers.require_family(timm_towers.read(path.parent), ("dinov3",), path)
    return plain_vit.source(
        arrays, path, gated=any(".mlp.gate." in name for name in arrays),
        settings={**settings, **mean_std.read(path.parent)},
        defaults={"activation": "gelu", **DEFAULTS},
    )  # fmt: skip


def _check_periods(periods: np.ndarray, path: Path) -> None:
    expected = THETA ** (np.arange(periods.size) / periods.size)
    if not np.allclose(periods, expected, rtol=1e-2):  # bfloat16 in some files
        raise unsupported(path, f"has rotary periods of another base than {THETA:g}")


def _mask_key_bias(arrays: plain_vit.State, name: str, path: Path) -> None:
    """Sets the bias of the keys to zero, as the mask does that is stored beside it."""
    mask, bias = arrays.pop(name), name.removesuffix("_mask")
    width = len(mask) // 3
    expected = np.repeat([1.0, 0.0, 1.0], width)
    if not np.array_equal(mask, expected):
        raise UserError(f"{path}: {name} is not 1 for queries and values, 0 for keys")
    arrays[bias] = np.where(mask == 0, 0, arrays[bias]).astype(np.float32)
