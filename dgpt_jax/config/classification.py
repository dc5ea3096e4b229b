"""Config of supervised training, and checks of the sections that it depends on."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dgpt_jax.config.ranges import BELOW_1, COUNT, NATURAL, SHARE
from dgpt_jax.config.schema import check_choice, field
from dgpt_jax.errors import UserError

if TYPE_CHECKING:
    from dgpt_jax.config.roots import TrainConfig


@dataclass(frozen=True)
class ClassificationConfig:
    """Section `classify`."""

    num_classes: int = field(1000, "number of classes; labels are 0 to num_classes - 1", COUNT)
    pooling: str = field("mean", "mean (of patch tokens, followed by a new norm) or cls")
    trainable: str = field("all", "all, or head: only classify.head, on the frozen encoder")
    head: str = field(
        "linear",
        "with trainable=head: linear (MAE's, standardized by batch statistics), dinov2 (its linear "
        "heads on four kinds of features) or attentive (AIM's); the last two train one head for "
        "each value of optim.base_lr_grid",
    )
    drop_path: float = field(
        0.1, "stochastic depth: drop rate of the last block; increases linearly from 0", BELOW_1
    )
    label_smoothing: float = field(
        0.1, "label smoothing: probability mass spread over all classes", BELOW_1
    )
    randaugment: str = field(
        "rand-m9-mstd0.5-inc1", "RandAugment policy in timm's notation; empty: none"
    )
    interpolation: str = field(
        "bicubic", "interpolation of RandAugment's geometric transforms: bicubic, bilinear, random"
    )
    jitter: tuple[float, float, float] = field(
        (0.0, 0.0, 0.0), "strengths of brightness, contrast and saturation jitter", NATURAL
    )
    random_erase_prob: float = field(
        0.25, "random erasing: probability that a box of the image becomes noise", SHARE
    )
    mixup: float = field(0.8, "mixup's alpha (Beta distribution); 0: no mixup", NATURAL)
    cutmix: float = field(
        1.0, "CutMix's alpha; 0: no CutMix. With both, one of them is drawn each time", NATURAL
    )
    mixup_group_size: int = field(
        128,
        "consecutive rows of a batch that share a mixup draw: the official code's batch per GPU",
        COUNT,
    )
    resize: int | None = field(
        None,
        "pixels of the shorter side (or both sides) before the center crop in evaluations; "
        "default: 256/224 of image_size; above 224 image_size itself, like the official code",
        COUNT,
    )

    def resolved(self) -> "ClassificationConfig":
        """Returns the config itself. Raises UserError on unknown choices."""
        check_choice("config.classify.pooling", self.pooling, ("mean", "cls"))
        check_choice("config.classify.trainable", self.trainable, ("all", "head"))
        check_choice("config.classify.head", self.head, ("linear", "dinov2", "attentive"))
        check_choice(
            "config.classify.interpolation", self.interpolation, ("bicubic", "bilinear", "random")
        )
        return self


def check_classification(config: "TrainConfig") -> None:
    """Raises UserError if values of a config with task=classify do not fit together."""
    task = config.classify
    if config.optim.kind == "lars" and task.trainable != "head":
        raise UserError("config.optim.kind=lars needs config.classify.trainable=head")
    if task.trainable == "head" and (config.optim.layer_decay != 1 or not config.init.weights):
        raise UserError("config.classify.trainable=head needs init.weights and optim.layer_decay=1")
    if config.model.positions != "sincos" or config.init.decoders != "auto":
        raise UserError(
            "config.model.positions and config.init.decoders need config.task=pretrain: supervised "
            "training always has learned positions and no decoders"
        )
    if task.trainable == "head" and (config.init.freeze_blocks or config.init.freeze_positions):
        raise UserError(
            "config.init.freeze_blocks and freeze_positions need config.classify.trainable=all: "
            "the encoder of a probe is always frozen"
        )
    _check_grid(config)
    if task.resize is not None and task.resize < config.model.image_size:
        raise UserError(
            f"config.classify.resize {task.resize} is smaller than the crop, "
            f"config.model.image_size {config.model.image_size}"
        )
    if (task.mixup or task.cutmix) and (
        config.batch_size % task.mixup_group_size or task.mixup_group_size % 2
    ):
        raise UserError(
            f"config.classify.mixup_group_size {task.mixup_group_size} must be even and divide "
            f"config.batch_size {config.batch_size}"
        )


def _check_grid(config: "TrainConfig") -> None:
    task, grid = config.classify, config.optim.base_lr_grid
    has_grid = task.trainable == "head" and task.head != "linear"
    if has_grid != bool(grid):
        raise UserError(
            f"config.optim.base_lr_grid {grid} must list learning rates for "
            f"classify.trainable=head with classify.head=dinov2 or attentive, else be empty"
        )
    if has_grid and not config.evals.heldout:
        raise UserError(
            "config.evals.heldout is empty: it selects the best head of config.optim.base_lr_grid"
        )
    if task.head == "dinov2" and task.pooling != "cls":
        raise UserError("config.classify.head=dinov2 needs classify.pooling=cls: it uses CLS")
    min_depth = {"dinov2": 4, "attentive": 6}.get(task.head, 0)
    if has_grid and config.model.depth < min_depth:
        raise UserError(
            f"config.classify.head={task.head} reads the last {min_depth} blocks, the model has "
            f"{config.model.depth}"
        )
