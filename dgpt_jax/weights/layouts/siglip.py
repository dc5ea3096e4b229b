"""SigLIP vision towers, and SigLIP 2's of fixed resolution, as Hugging Face publishes them.

The teacher's tokens are `last_hidden_state`: all patches after `post_layernorm`. There is no CLS
token, and the attention-pooling head is left out.
"""

from collections.abc import Mapping
from pathlib import Path

from dgpt_jax.convert import hugging_face, normalisation
from dgpt_jax.convert.layout import Entry, hugging_face_layers, norm, patch_embed
from dgpt_jax.convert.source import Source, part, refusal

PATCH = "embeddings.patch_embedding"
# `model_type` of Hugging Face's models of these names, and the eps that their configs leave out.
TYPES = {"siglip": 1e-6, "siglip_vision_model": 1e-6}


def entries(depth: int) -> list[Entry]:
    """The names of a SiglipVisionModel, after `vision_model.` where there is that prefix."""
    table = patch_embed(PATCH, "patch_embed")
    table.append(Entry("embeddings.position_embedding.weight", "positions"))
    table += norm("post_layernorm", "ln_post")
    return table + hugging_face_layers("encoder.layers", depth)


def source(state: Mapping, path: Path) -> Source | None:
    """The tower of a SiglipModel or SiglipVisionModel; None where the arrays are no SigLIP's.

    Raises UserError for SigLIP 2 of any resolution (NaFlex).
    """
    prefix = "vision_model." if any(n.startswith("vision_model.") for n in state) else ""
    vision = part(state, prefix)
    if not any(name.startswith(f"{PATCH}.") for name in vision):
        return None
    if f"{PATCH}.weight" in vision and vision[f"{PATCH}.weight"].ndim != 4:
        raise refusal(path, "holds a SigLIP 2 of variable resolution (NaFlex)")
    vision.pop("embeddings.position_ids", None)  # a buffer of old versions
    told, claims = hugging_face.config(path.parent, TYPES, activation="gelu_pytorch_tanh")
    return Source(
        {name: array for name, array in vision.items() if not name.startswith("head.")},
        entries,
        fields={
            "activation": "gelu_tanh",
            "eps": 1e-6,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "cls": False,
            "pre_norm": False,
            "patch_bias": True,
        },
        told=told | normalisation.told(path.parent),
        claims=claims,
    )
