"""FLOPs of the model, counted from its config: what MFU is measured against.

Only matrix products count; a multiply-add is two. A backward pass costs twice its forward pass.
"""

from collections.abc import Sequence

from dgpt_jax import segments
from dgpt_jax.config import Model
from dgpt_jax.towers import Tower

FORMULA = (
    "3 x forward, matrix products only, 2 a multiply-add: an encoder block of N tokens, width D, "
    "MLP ratio r is 2N(4+2r)D^2 + 4N^2 D, attention counted whole though half of it is masked"
)


def step_flops(model: Model, *, out_width: int, decoders: Sequence[str], teacher: Tower | None):
    """FLOPs of one image in a training step; `teacher` is one that runs within it."""
    student = 3 * sum(forward_flops(model, out_width=out_width, decoders=decoders).values())
    return student + (tower_flops(teacher) if teacher else 0)


def forward_flops(
    model: Model, *, out_width: int, decoders: Sequence[str] = ("next", "visible")
) -> dict[str, float]:
    """FLOPs of one image's forward pass in pretraining, by part.

    With N tokens of width D and an MLP of r·D, an encoder block has 2·N·(4 + 2r)·D² in its
    projections and 4·N²·D in its attention, which is counted whole although half of it is masked.
    N = (S-1)·T + 1: the last segment never enters the encoder, and CLS does. `out_width` is the
    width of the targets.
    """
    width, r = model.width, model.mlp_ratio
    all_patches = model.grid**2
    places = model.segments[0] * model.segments[1]
    tokens = segments.visible_count(model.segments) * all_patches // places + 1
    found = {
        "patches": 2 * all_patches * 3 * model.patch**2 * width,
        "encoder": model.depth * block_flops(tokens, width, r * width),
    }
    wide, depth = model.decoder_width, model.decoder_depth
    memory = 2 * tokens * len(model.taps) * width * wide * depth
    cross_attention = 8 * tokens * wide**2 + 4 * tokens**2 * wide
    decoder_block = block_flops(tokens, wide, r * wide) + cross_attention
    decoder = memory + depth * decoder_block + 2 * tokens * wide * out_width
    for name in decoders:
        found[name] = 2 * tokens * width * out_width if name == "direct" else decoder
    return found


def classifier_flops(model: Model, classes: int) -> float:
    """FLOPs of one image in a step of supervised training: all patches, CLS, full attention."""
    patches, width = model.grid**2, model.width
    forward = (
        2 * patches * 3 * model.patch**2 * width
        + model.depth * block_flops(patches + 1, width, model.mlp_ratio * width)
        + 2 * width * classes
    )
    return 3 * forward


def block_flops(tokens: int, width: int, mlp_width: float) -> float:
    """Self-attention with its projections, and an MLP."""
    return 2 * tokens * width * (4 * width + 2 * mlp_width) + 4 * tokens**2 * width


def tower_flops(tower: Tower) -> float:
    """FLOPs of one image's forward pass through a teacher."""
    patches = tower.grid[0] * tower.grid[1]
    tokens = patches + tower.cls
    # A gated MLP has three matrices of mlp_width.
    mlp_width = tower.mlp_width * (1.5 if tower.activation == "swiglu" else 1)
    return (
        2 * patches * 3 * tower.patch**2 * tower.width
        + tower.depth * block_flops(tokens + tower.registers, tower.width, mlp_width)
        + 2 * tokens * tower.width * (tower.out_width or 0)
    )
