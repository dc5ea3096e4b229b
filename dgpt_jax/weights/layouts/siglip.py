"""Vision towers of SigLIP, and of SigLIP 2 with fixed resolution, as published by Hugging Face.

The teacher's tokens are `last_hidden_state`: all patches after `post_layernorm`. There is no CLS
token, and the attention-pooling head is dropped.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dgpt_jax.weights import hf_json, mean_std
from dgpt_jax.weights.mapping import ArrayEntry, hugging_face_layers, norm, patch_embed
from dgpt_jax.weights.source import Source, strip_prefix, unsupported

PATCH = "embeddings.patch_embedding"
# {model_type: default eps} of Hugging Face's models with these names.
TYPES = {"siglip": 1e-6, "siglip_vision_model": 1e-6}


def entries(depth: int) -> list[ArrayEntry]:
    """Table by the names of a SiglipVisionModel, without the prefix `vision_model.`."""
    table = patch_embed(PATCH, "patch_embed")
    table.append(ArrayEntry("embeddings.position_embedding.weight", "positions"))
    table += norm("post_layernorm", "ln_post")
    return table + hugging_face_layers("encoder.layers", depth)


def source(state: Mapping[str, np.ndarray], path: Path) -> Source | None:
    """Tower of a SiglipModel or SiglipVisionModel; None for other arrays.

    Raises UserError for SigLIP 2 of variable resolution (NaFlex).
    """
    prefix = "vision_model." if any(n.startswith("vision_model.") for n in state) else ""
    vision = strip_prefix(state, prefix)
    if not any(name.startswith(f"{PATCH}.") for name in vision):
        return None
    if f"{PATCH}.weight" in vision and vision[f"{PATCH}.weight"].ndim != 4:
        raise unsupported(path, "is a SigLIP 2 of variable resolution (NaFlex)")
    vision.pop("embeddings.position_ids", None)  # a buffer of old versions
    settings, expected = hf_json.config(path.parent, TYPES, activation="gelu_pytorch_tanh")
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
    )
