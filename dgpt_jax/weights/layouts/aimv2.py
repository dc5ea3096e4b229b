"""AIMv2 vision towers as published by Apple and by Hugging Face.

The teacher's tokens are all patches after the final norm: there is no CLS token. The
attention-pooling head of the `lit` models is dropped.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dgpt_jax.weights import hf_json, mean_std, plain_vit, positions
from dgpt_jax.weights.source import Source

# {model_type: default eps} of Hugging Face's models with these names.
TYPES = {"aimv2_vision_model": 1e-5, "aimv2": 1e-5}
HUGGING_FACE = (
    (r"^vision_model\.", ""),
    (r"^embeddings\.patch_embed\.", "patch_embed.proj."),
    (r"^embeddings\.rms_norm\.", "patch_embed.norm."),
    (r"^embeddings\.position_embedding\.weight", "pos_embed"),
    (r"^rms_norm\.", "norm."),
    (r"^encoder\.layers\.", "blocks."),
    (r"\.rms_norm([12])\.", r".norm\1."),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
    (r"\.attention\.out_proj\.", ".attn.proj."),
    (r"\.ffn\.(gate|up)_proj\.", r".mlp.\1."),
    (r"\.ffn\.down_proj\.", ".mlp.fc2."),
)
# fc1 is the gate, fc3 what it gates, fc2 the output.
ORIGINAL = (
    (r"^(?:module\.|image_encoder\.)+", ""),
    (r"^preprocessor\.patchifier\.", "patch_embed."),
    (r"^preprocessor\.pos_embed", "pos_embed"),
    (r"^trunk\.post_trunk_norm\.", "norm."),
    (r"^trunk\.blocks\.", "blocks."),
    (r"\.norm_([12])\.", r".norm\1."),
    (r"\.mlp\.fc1\.", ".mlp.gate."),
    (r"\.mlp\.fc3\.", ".mlp.up."),
)


def source(state: Mapping[str, np.ndarray], path: Path) -> Source | None:
    """Tower of an Aimv2Model, an Aimv2VisionModel or Apple's own files; None for other arrays.

    A tower without positions (native resolution) has fixed ones. Raises UserError.
    """
    if any(name.endswith("embeddings.rms_norm.weight") for name in state):
        rules = HUGGING_FACE
    elif any(name.endswith("trunk.post_trunk_norm.weight") for name in state):
        rules = ORIGINAL
    else:
        return None
    tower = {n: x for n, x in state.items() if not n.startswith(("text_model.", "text_encoder."))}
    arrays = plain_vit.rename(tower, rules)
    plain_vit.drop(
        arrays,
        ("head.", "embeddings.position_ids", "visual_projection", "text_projection", "logit_scale"),
    )
    settings, expected = hf_json.config(
        path.parent, TYPES, activation="silu", heads=8,
        values={"qkv_bias": False}, any_of=("is_native", "mlp_bias", "use_head"),
    )  # fmt: skip
    resize = positions.bicubic
    if "pos_embed" not in arrays and "patch_embed.proj.weight" in arrays:
        resize = positions.sincos
        width, _, patch, _ = arrays["patch_embed.proj.weight"].shape
        side = settings.get("image_size", 224) // patch
        arrays["pos_embed"] = resize(np.zeros((0, width)), (side, side), False)
    return plain_vit.source(
        arrays, path, gated=True, settings=settings | mean_std.read(path.parent),
        defaults={"eps": 1e-5}, expected=expected, resize=resize,
    )  # fmt: skip
