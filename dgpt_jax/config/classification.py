"""Supervised training as a section of the config, and what it asks of the others."""

from dataclasses import dataclass

from dgpt_jax.schema import BELOW_1, COUNT, NATURAL, SHARE, UserError, entry, one_of


@dataclass(frozen=True)
class Classify:
    weights: str = entry(
        "",
        "what task=classify starts from: a work directory or weights; empty: random ones",
        path=True,
    )
    num_classes: int = entry(1000, "classes of the data, labels 0 to num_classes - 1", COUNT)
    pooling: str = entry("mean", "mean (of the patch tokens, then a fresh norm) or cls")
    train: str = entry("all", "all, or head: what classify.head names, on the frozen encoder")
    head: str = entry(
        "linear",
        "with train=head: linear (MAE's, standardised by batch), dinov2 (its linear heads on four "
        "kinds of features) or attentive (AIM's); the last two a head for each of optim.grid",
    )
    drop_path: float = entry(
        0.1, "stochastic depth: rate of the last block, 0 in the first", BELOW_1
    )
    smoothing: float = entry(0.1, "share of a label that is spread over all classes", BELOW_1)
    randaugment: str = entry(
        "rand-m9-mstd0.5-inc1", "timm's name of a RandAugment policy; empty: none"
    )
    interpolation: str = entry("bicubic", "of its shifts and turns: bicubic, bilinear or random")
    jitter: tuple[float, float, float] = entry(
        (0.0, 0.0, 0.0), "strengths of random brightness, contrast and saturation", NATURAL
    )
    erase: float = entry(0.25, "probability that a box of the picture becomes noise", SHARE)
    mixup: float = entry(0.8, "parameter of mixup's Beta distribution; 0: no mixup", NATURAL)
    cutmix: float = entry(1.0, "the same of cutmix; with both, one of them is drawn", NATURAL)
    mix_group: int = entry(
        128,
        "neighbouring rows of a batch that are mixed alike: the official code's batch of a GPU",
        COUNT,
    )
    resize: int | None = entry(
        None,
        "pixels of the shorter side (or both) before the centre crop of an evaluation; default: "
        "256/224 of image_size, above 224 image_size itself, as the official code has it",
        COUNT,
    )

    def resolved(self) -> "Classify":
        """Itself. Raises UserError on values that mean nothing."""
        one_of("config.classify.pooling", self.pooling, ("mean", "cls"))
        one_of("config.classify.train", self.train, ("all", "head"))
        one_of("config.classify.head", self.head, ("linear", "dinov2", "attentive"))
        one_of(
            "config.classify.interpolation", self.interpolation, ("bicubic", "bilinear", "random")
        )
        return self


def fit(config):
    """Raises UserError where the values of a config with task=classify do not go together."""
    task = config.classify
    if config.optim.kind == "lars" and task.train != "head":
        raise UserError("config.optim.kind=lars is for config.classify.train=head")
    if task.train == "head" and (config.optim.layer_decay != 1 or not task.weights):
        raise UserError("config.classify.train=head needs classify.weights and optim.layer_decay=1")
    _fit_grid(config)
    if task.resize is not None and task.resize < config.model.image_size:
        raise UserError(
            f"config.classify.resize {task.resize} is smaller than config.model.image_size "
            f"{config.model.image_size}, which is cut from it"
        )
    if (task.mixup or task.cutmix) and (config.batch_size % task.mix_group or task.mix_group % 2):
        raise UserError(
            f"config.classify.mix_group {task.mix_group} must be even and divide "
            f"config.batch_size {config.batch_size}"
        )


def _fit_grid(config):
    task, grid = config.classify, config.optim.grid
    many = task.train == "head" and task.head != "linear"
    if many != bool(grid):
        raise UserError(
            f"config.optim.grid {grid} must name learning rates for "
            f"classify.train=head with classify.head=dinov2 or attentive, and be empty else"
        )
    if many and not config.evals.heldout:
        raise UserError(
            "config.evals.heldout is empty: the best head of config.optim.grid is chosen by it"
        )
    if task.head == "dinov2" and task.pooling != "cls":
        raise UserError("config.classify.head=dinov2 needs classify.pooling=cls: it has CLS")
    least = {"dinov2": 4, "attentive": 6}.get(task.head, 0)
    if many and config.model.depth < least:
        raise UserError(
            f"config.classify.head={task.head} reads the last {least} blocks, the model has "
            f"{config.model.depth}"
        )
