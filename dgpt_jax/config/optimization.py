"""Configs of the losses and the optimizer."""

from dataclasses import dataclass

from dgpt_jax.config.ranges import BELOW_1, COUNT, NATURAL, POSITIVE, Range
from dgpt_jax.config.schema import field


@dataclass(frozen=True)
class LossConfig:
    """Section `loss`."""

    next: float = field(1.0, "weight of the generative loss (next segment); 0 disables it", NATURAL)
    visible: float = field(
        1.0, "weight of the discriminative loss (visible segments); 0 disables it", NATURAL
    )
    distill: float = field(
        0.0,
        "weight of plain feature distillation: visible tokens, predicted from the last block by "
        "one linear layer without a decoder; 0 disables it",
        NATURAL,
    )

    def by_head(self) -> dict[str, float]:
        """Returns {head: weight} of the enabled losses. Heads are named like their parameters, the
        distillation head "direct"."""
        weights = {"next": self.next, "visible": self.visible, "direct": self.distill}
        return {head: weight for head, weight in weights.items() if weight}


@dataclass(frozen=True)
class OptimConfig:
    """Section `optim`."""

    kind: str = field("adamw", "optimizer: adamw; with task=classify also sgd or lars")
    blr: float = field(1.5e-4, "base learning rate; the peak is blr * batch_size / 256", NATURAL)
    base_lr_grid: tuple[float, ...] = field(
        (), "task=classify: base learning rates of a probe's heads, instead of blr", POSITIVE
    )
    warmup: str = field("40 epochs", "linear warmup from 0; a duration")
    min_lr: float = field(0.0, "learning rate at the end of the cosine schedule", NATURAL)
    layer_decay: float = field(
        1.0,
        "factor of the learning rate per layer, from the head, or the decoders, down",
        Range(above=0, most=1),
    )
    weight_decay: float = field(
        0.05,
        "decoupled weight decay; not applied to biases, norms and positions, with task=classify "
        "nor to CLS",
        NATURAL,
    )
    b1: float = field(0.9, "beta 1 of AdamW; momentum of sgd and lars", BELOW_1)
    b2: float = field(0.95, "beta 2 of AdamW", BELOW_1)
    clip_norm: float = field(
        0.0, "global L2 norm that gradients are clipped to; 0: no clipping", NATURAL
    )
    mu_dtype: str = field("float32", "dtype of the first moment: float32 or bfloat16")
    max_skipped_in_a_row: int = field(
        10, "stop after this many consecutive updates were skipped as non-finite or spikes", COUNT
    )
    loss_spike_factor: float = field(
        0.0,
        "skip updates whose loss exceeds this multiple of its running mean; 0: skip none",
        Range(above=1, also=(0,)),
    )
    ema: float = field(
        0.0,
        "decay per step of a moving average of the parameters, which is then evaluated and "
        "exported; 0: no average",
        BELOW_1,
    )
