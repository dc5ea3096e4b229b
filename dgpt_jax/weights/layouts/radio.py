"""C-RADIO and TIPSv2 towers as published by NVIDIA and Google, and by Hugging Face.

The teacher's tokens are the first class token and the patches. C-RADIO has no final norm; its other
class tokens (one per teacher of its own) and its registers are dropped, and its positions, a table
for 2,048 pixels, are resized to the input. TIPSv2's register, a second class token, is dropped.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dgpt_jax.weights import hf_json, mean_std, plain_vit, positions
from dgpt_jax.weights.source import Source, strip_prefix

# {model_type: default eps} of Hugging Face's models with these names.
RADIO, TIPS = {"radio": 1e-6}, {"tipsv2_vision_model": 1e-6, "tipsv2": 1e-6}
BLOCKS = (
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1", r".ls\1.gamma"),
    (r"\.mlp\.(gate|up)_proj\.", r".mlp.\1."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
)
RADIO_NAMES = (
    (r"^radio_model\.", ""),
    (
        r"^(?:model\.patch_generator|embeddings)\.(?:embedder|patch_projection)\.",
        "patch_embed.proj.",
    ),
    (r"^(?:model\.patch_generator\.pos_embed|embeddings\.position_embedding)$", "pos_embed"),
    (r"^(?:model\.patch_generator\.cls_token\.token|embeddings\.cls_register_token)$", "prefix"),
    (r"^model\.blocks\.", "blocks."),
    *BLOCKS,
)
TIPS_NAMES = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^(?:embeddings\.)?register_tokens$", "reg_token"),
    (r"^embeddings\.", ""),
    (r"^layernorm\.", "norm."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
    *BLOCKS,
)


def radio(state: Mapping[str, np.ndarray], path: Path) -> Source | None:
    """Tower of a RadioModel or of NVIDIA's own files; None for other arrays. Raises UserError."""
    arrays = plain_vit.rename(state, RADIO_NAMES)
    if "prefix" not in arrays or "patch_embed.proj.weight" not in arrays:
        return None
    stated = {
        name: tuple(float(x) for x in arrays.pop(f"input_conditioner.norm_{name}").ravel())
        for name in ("mean", "std")
        if f"input_conditioner.norm_{name}" in arrays
    }
    plain_vit.drop(
        arrays, ("summary_idxs", "embeddings.video_patch", "model.patch_generator.video_embedder")
    )
    prefix = arrays.pop("prefix")
    arrays["cls_token"], arrays["reg_token"] = prefix[:1], prefix[1:]
    kernel = arrays["patch_embed.proj.weight"]
    patch = round((kernel.shape[-1] / 3) ** 0.5)
    arrays["patch_embed.proj.weight"] = kernel.reshape(-1, 3, patch, patch)
    plain_vit.separate_prefix_positions(arrays)
    settings, expected = hf_json.config(
        path.parent, RADIO, activation="gelu", heads=16,
        any_of=("max_img_size", "num_cls_tokens", "num_registers", "patch_dim", "norm_mean",
                "norm_std", "summary_idxs", "video_temporal_patch_size", "video_patch_dim"),
    )  # fmt: skip
    settings["image_size"] = patch * round((arrays["pos_embed"].shape[1] - 1) ** 0.5)
    return plain_vit.source(
        arrays, path, gated=any(".mlp.gate." in name for name in arrays),
        settings=settings | mean_std.read(path.parent) | stated,
        defaults={"activation": "gelu", "eps": 1e-6}, expected=expected,
        resize=positions.bilinear,
    )  # fmt: skip


def tips(state: Mapping[str, np.ndarray], path: Path) -> Source | None:
    """Vision tower of a Tipsv2Model or a Tipsv2VisionModel; None for other arrays.

    Raises UserError.
    """
    tower = strip_prefix(state, "vision_model.", "vision_encoder.") or dict(state)
    hugging_face = "encoder.layer.0.attention.q_proj.weight" in tower
    named = hf_json.model_type(path.parent) in TIPS
    if not (hugging_face or ("register_tokens" in tower and named)):
        return None  # without that JSON the names are DINOv2's too
    arrays = plain_vit.rename(tower, TIPS_NAMES)
    if "reg_token" not in arrays or "pos_embed" not in arrays:
        return None
    plain_vit.drop(arrays, ("mask_token",))
    settings, expected = hf_json.config(path.parent, TIPS, activation="gelu")
    gated = "blocks.0.mlp.gate.weight" in arrays or any(".mlp.w12." in name for name in tower)
    plain_vit.separate_prefix_positions(arrays)
    return plain_vit.source(
        arrays, path, gated=gated, settings=settings | mean_std.read(path.parent),
        defaults={"activation": "gelu", "eps": 1e-6}, expected=expected,
        resize=positions.bilinear_antialiased,
    )  # fmt: skip
