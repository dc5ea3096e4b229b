"""Config of the student: encoder, segments, decoders."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dgpt_jax.config.ranges import COUNT, POSITIVE, Range
from dgpt_jax.config.schema import check_choice, field
from dgpt_jax.errors import UserError

# {size: (width, depth, heads, patch size in pixels)}
SIZES = {
    "Ti/16": (192, 12, 3, 16),
    "S/16": (384, 12, 6, 16),
    "B/16": (768, 12, 12, 16),
    "L/16": (1024, 24, 16, 16),
    "L/14": (1024, 24, 16, 14),
    "H/14": (1280, 32, 16, 14),
}

if TYPE_CHECKING:  # None only until `resolved` sets them
    DerivedInt = int
    DerivedTuple = tuple[int, ...]
else:
    DerivedInt, DerivedTuple = int | None, tuple[int, ...] | None


@dataclass(frozen=True)
class ModelConfig:
    """Section `model`."""

    size: str = field("B/16", f"one of {', '.join(SIZES)}; sets width, depth, heads and patch")
    width: DerivedInt = field(None, "encoder width; default: from size", Range(least=4))
    depth: DerivedInt = field(None, "number of encoder blocks; default: from size", COUNT)
    heads: DerivedInt = field(None, "attention heads of the encoder; default: from size", COUNT)
    patch: DerivedInt = field(None, "patch size in pixels; default: from size", COUNT)
    mlp_ratio: float = field(4.0, "hidden width of every MLP divided by its input width", POSITIVE)
    image_size: int = field(224, "height and width of the student's input in pixels", COUNT)
    segments: tuple[int, int] = field(
        (2, 2), "rows and columns of segments that the image is divided into", COUNT
    )
    taps: DerivedTuple = field(
        None,
        "encoder depths (1-based) whose features the decoders attend to; default: 1/2, 2/3, 5/6 "
        "and 1 of depth",
        COUNT,
    )
    decoder_width: int = field(1024, "width of both decoders", Range(least=4))
    decoder_depth: int = field(2, "number of blocks in each decoder", COUNT)
    decoder_heads: int = field(32, "attention heads of each decoder", COUNT)
    separate_decoders: bool = field(
        False,
        "decoders of its own for each further teacher (config.teachers); false: a prediction head "
        "each on the same decoders",
    )
    cls_mask: str = field(
        "official",
        "which tokens attend to CLS besides itself: official (the last visible segment), self "
        "(none), all (leaks later segments to earlier ones; for ablations)",
    )
    positions: str = field(
        "sincos",
        "positions of the encoder in pretraining: sincos (fixed) or learned (parameters that start "
        "as sin-cos or from init.weights)",
    )
    remat: str = field("none", "activations recomputed in the backward pass: none, dots or full")
    eps: float = field(1e-6, "epsilon of the encoder's LayerNorms", Range(above=0, below=1))
    activation: str = field(
        "gelu", "activation of the encoder's MLPs: gelu (exact), gelu_tanh or quick_gelu"
    )

    @property
    def grid(self) -> int:
        """Patches along each side of the image."""
        return self.image_size // self.patch

    def resolved(self) -> "ModelConfig":
        """Returns the config with defaults from size and depth. Raises UserError on values that do
        not fit together."""
        check_choice("config.model.size", self.size, SIZES)
        check_choice("config.model.cls_mask", self.cls_mask, ("official", "self", "all"))
        check_choice("config.model.positions", self.positions, ("sincos", "learned"))
        check_choice("config.model.remat", self.remat, ("none", "dots", "full"))
        check_choice(
            "config.model.activation", self.activation, ("gelu", "gelu_tanh", "quick_gelu")
        )
        sized = dict(zip(("width", "depth", "heads", "patch"), SIZES[self.size], strict=True))
        sized = {k: v for k, v in sized.items() if getattr(self, k) is None}
        model = dataclasses.replace(self, **sized)
        if model.taps is None:
            depths = (max(1, round(model.depth * f)) for f in (1 / 2, 2 / 3, 5 / 6, 1))
            model = dataclasses.replace(model, taps=tuple(dict.fromkeys(depths)))
        taps, depth = model.taps, model.depth
        if list(taps) != sorted(set(taps)) or not taps or taps[-1] > depth:
            raise UserError(
                f"config.model.taps must increase within 1..{depth} (depth), got {taps}"
            )
        if model.image_size % model.patch:
            raise UserError(
                f"config.model.image_size {model.image_size} is not a multiple of the patch size "
                f"{model.patch}"
            )
        if any(model.grid % s for s in model.segments):
            raise UserError(
                f"config.model.segments {model.segments} do not divide the "
                f"{model.grid}×{model.grid} grid of patches"
            )
        for prefix in ("", "decoder_"):
            width, heads = getattr(model, f"{prefix}width"), getattr(model, f"{prefix}heads")
            if width % 4 or width % heads:
                raise UserError(
                    f"config.model.{prefix}width {width} must be a multiple of 4 (sin-cos "
                    f"positions) and of {prefix}heads {heads}"
                )
        return model
