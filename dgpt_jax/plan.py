"""What a train step costs, from its config alone."""

from collections.abc import Sequence

from dgpt_jax import segments
from dgpt_jax.config import Model


def forward_flops(
    model: Model, *, out_width: int, decoders: Sequence[str] = ("next", "visible")
) -> dict[str, float]:
    """FLOPs of one image's forward pass in pretraining, by part; a multiply-add counts two.

    Matrix products only: with N tokens of width D and an MLP of r·D, an encoder block has
    2·N·(4 + 2r)·D² in its projections and 4·N²·D in its attention, which is counted whole although
    half of it is masked. N = (S-1)·T + 1: the last segment never enters the encoder, and CLS does.
    `out_width` is the width of the targets. Backward costs twice as much again.
    """
    width, r = model.width, model.mlp_ratio
    all_patches = model.grid**2
    places = model.segments[0] * model.segments[1]
    tokens = segments.visible_count(model.segments) * all_patches // places + 1
    block = 2 * tokens * (4 + 2 * r) * width**2 + 4 * tokens**2 * width
    found = {
        "patches": 2 * all_patches * 3 * model.patch**2 * width,
        "encoder": model.depth * block,
    }
    wide, depth = model.decoder_width, model.decoder_depth
    memory = 2 * tokens * len(model.taps) * width * wide * depth
    decoder_block = 2 * tokens * (8 + 2 * r) * wide**2 + 8 * tokens**2 * wide
    prediction = 2 * tokens * wide * out_width
    for name in decoders:
        found[name] = memory + depth * decoder_block + prediction
    return found
