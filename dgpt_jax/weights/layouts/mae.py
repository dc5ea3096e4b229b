"""MAE's checkpoints (`models_mae.py`): their encoder, whose norm stands after all tokens."""

from pathlib import Path

from dgpt_jax.convert import layout, timm
from dgpt_jax.convert.weights import Layout, Weights, assumed, encoder_shapes
from dgpt_jax.schema import UserError

DECODER = ("decoder_", "mask_token")
# The three models of the official code, by width.
HEADS = {768: 12, 1024: 16, 1280: 16}


def read(state, path: Path, heads=None, decoder_heads=None) -> Weights:
    """The encoder; a decoder, where there is one, is left out, and a note says so."""
    if "norm.weight" not in state or "patch_embed.proj.weight" not in state:
        raise UserError(f"{path} holds no MAE encoder: it needs patch_embed.proj and norm")
    heads = heads or HEADS.get(state["norm.weight"].size)
    model = timm.model_of(state, {}, heads, path)
    notes = assumed(path, ("mean", "std"), "ImageNet's, as in MAE's own code,")
    if any(name.startswith(DECODER) for name in state):
        notes += (f"{path}: MAE's decoder is left out",)
    table = timm.entries(model.depth, "cls", head=False)
    shapes = encoder_shapes(model, "cls", 0)
    params = layout.read(table, state, shapes, ignore=DECODER, what=str(path))
    return Weights(model, params, "cls", str(path), notes=notes)


LAYOUT = Layout(
    "mae",
    found=lambda state, path: (
        state is not None and "decoder_embed.weight" in state and "mask_token" in state
    ),
    read=read,
    table=lambda weights: timm.entries(weights.model.depth, "cls", head=False),
)
