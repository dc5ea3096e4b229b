"""Vision towers of SigLIP and SigLIP 2 as published by Hugging Face.

The teacher's tokens are `last_hidden_state`: all patches after `post_layernorm`. There is no CLS
token, and the attention-pooling head is dropped.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dgpt_jax.weights import hf_json, mean_std, positions
from dgpt_jax.weights.mapping import ArrayEntry, hugging_face_layers, norm, patch_embed
from dgpt_jax.weights.source import Source, strip_prefix

PATCH = "embeddings.patch_embedding"
# {model_type: default eps} of Hugging Face's models with these names.
TYPES = {"siglip": 1e-6, "siglip_vision_model": 1e-6}
NAFLEX_TYPES = {"siglip2": 1e-6, "siglip2_vision_model": 1e-6}


def entries(depth: int) -> list[ArrayEntry]:
    """Table by the names of a SiglipVisionModel, without the prefix `vision_model.`."""
    table = patch_embed(PATCH, "patch_embed")
    table.append(ArrayEntry("embeddings.position_embedding.weight", "positions"))
    table += norm("post_layernorm", "ln_post")
    return table + hugging_face_layers("encoder.layers", depth)


def source(state: Mapping[str, np.ndarray], path: Path) -> Source | None:
    """Tower of a SiglipModel or SiglipVisionModel; None for other arrays.

    A SigLIP 2 of variable resolution (NaFlex) has square inputs here. Raises UserError.
    """
    prefix = "vision_model." if any(n.startswith("vision_model.") for n in state) else ""
    vision = strip_prefix(state, prefix)
    if not any(name.startswith(f"{PATCH}.") for name in vision):
        return None
    kernel, types, resize = vision.get(f"{PATCH}.weight"), TYPES, positions.bicubic
    if kernel is not None and kernel.ndim == 2:  # a patch is a row of pixels with their channels
        patch = round((kernel.shape[1] / 3) ** 0.5)
        kernel = kernel.reshape(-1, patch, patch, 3).transpose(0, 3, 1, 2)
        vision[f"{PATCH}.weight"] = kernel
        types, resize = NAFLEX_TYPES, positions.bilinear_antialiased
    vision.pop("embeddings.position_ids", None)  # a buffer of old versions
    settings, expected = hf_json.config(
        path.parent, types, activation="gelu_pytorch_tanh", any_of=("num_patches",)
    )
    return Source(
        {name: array for name, array in vision.items() if not name.startswith("head.")},
        entries,
        defaults={
            "activation": "gelu_tanh",
            "eps": 1e-6,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "cls": False,
            "pre_norm": False,
            "patch_bias": True,
        },
        settings=settings | mean_std.read(path.parent),
        expected=expected,
        resize=resize,
    )
