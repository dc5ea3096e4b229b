"""FLOPs of the model, counted from its config, for MFU.

Only matrix products count; a multiply-add is two. A backward pass costs twice its forward pass.
"""

from collections.abc import Sequence

from dgpt_jax.config import ModelConfig
from dgpt_jax.data import segments
from dgpt_jax.models.teacher_vit import TeacherArchitecture

FORMULA = (
    "3 x forward, matrix products only, 2 a multiply-add: an encoder block of N tokens, width D, "
    "MLP ratio r is 2N(4+2r)D^2 + 4N^2 D, attention counted in full though half of it is masked"
)


def step_flops(
    model: ModelConfig,
    *,
    out_width: int | None,
    further: Sequence[int] = (),
    decoders: Sequence[str],
    teacher: TeacherArchitecture | None,
) -> float:
    """FLOPs per image of a training step; `teacher` is given if it runs within the step."""
    forward = forward_flops(model, out_width=out_width, further=further, decoders=decoders)
    student = 3 * sum(forward.values())
    return student + (teacher_flops(teacher) if teacher else 0)


def forward_flops(
    model: ModelConfig,
    *,
    out_width: int | None,
    further: Sequence[int] = (),
    decoders: Sequence[str] = ("next", "visible"),
) -> dict[str, float]:
    """FLOPs per image of the pretraining forward pass: {component: FLOPs}.

    With N tokens of width D and an MLP of r·D, an encoder block has 2·N·(4 + 2r)·D² in its
    projections and 4·N²·D in its attention, counted in full although half of it is masked.
    N = (S-1)·T + 1: all segments but the last, and CLS. `out_width` and `further` are the widths of
    the targets, as of digpt.build.
    """
    width, r = model.width, model.mlp_ratio
    all_patches = model.grid**2
    visible, count = segments.visible_count(model.segments), segments.count(model.segments)
    tokens = visible * all_patches // count + 1
    result = {
        "patches": 2 * all_patches * 3 * model.patch**2 * width,
        "encoder": model.depth * block_flops(tokens, width, r * width),
    }
    wide, depth = model.decoder_width, model.decoder_depth
    memory = 2 * tokens * len(model.taps) * width * wide * depth
    cross_attention = 8 * tokens * wide**2 + 4 * tokens**2 * wide
    decoder_block = block_flops(tokens, wide, r * wide) + cross_attention
    widths = [w for w in (out_width, *further) if w]
    copies = len(widths) if model.separate_decoders else 1
    decoder = copies * (memory + depth * decoder_block) + 2 * tokens * wide * sum(widths)
    for name in decoders:
        result[name] = 2 * tokens * width * sum(widths) if name == "direct" else decoder
    return result


def classifier_flops(model: ModelConfig, classes: int) -> float:
    """FLOPs per image of a supervised training step: all patches, CLS, full attention."""
    patches, width = model.grid**2, model.width
    forward = (
        2 * patches * 3 * model.patch**2 * width
        + model.depth * block_flops(patches + 1, width, model.mlp_ratio * width)
        + 2 * width * classes
    )
    return 3 * forward


def block_flops(tokens: int, width: int, mlp_width: float) -> float:
    """FLOPs of self-attention with its projections, and an MLP."""
    return 2 * tokens * width * (4 * width + 2 * mlp_width) + 4 * tokens**2 * width


def teacher_flops(tower: TeacherArchitecture) -> float:
    """FLOPs per image of a teacher's forward pass."""
    patches = tower.grid[0] * tower.grid[1]
    tokens = patches + tower.cls
    # A gated MLP has three matrices of mlp_width.
    mlp_width = tower.mlp_width * (1.5 if tower.activation == "swiglu" else 1)
    return (
        2 * patches * 3 * tower.patch**2 * tower.width
        + tower.depth * block_flops(tokens + tower.registers, tower.width, mlp_width)
        + 2 * tokens * tower.width * (tower.out_width or 0)
    )
