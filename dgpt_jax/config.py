"""What can be configured, and nothing else can: one frozen dataclass a command.

A config file starts from `default(Train)` (or `Tokens`, `Evaluate`), so that every field exists and
can be overridden on the command line; `schema.parse` turns the result into the dataclass.
"""

import dataclasses
from dataclasses import dataclass

from dgpt_jax.schema import UserError, entry, one_of

# width, depth, heads, patch size in pixels.
SIZES = {
    "S/16": (384, 12, 6, 16),
    "B/16": (768, 12, 12, 16),
    "L/16": (1024, 24, 16, 16),
    "L/14": (1024, 24, 16, 14),
    "H/14": (1280, 32, 16, 14),
}


@dataclass(frozen=True)
class Model:
    size: str = entry("B/16", f"one of {', '.join(SIZES)}; sets width, depth, heads and patch")
    width: int | None = entry(None, "encoder width; default: by size")
    depth: int | None = entry(None, "encoder blocks; default: by size")
    heads: int | None = entry(None, "encoder attention heads; default: by size")
    patch: int | None = entry(None, "patch size in pixels; default: by size")
    mlp_ratio: float = entry(4.0, "hidden width of every MLP over its block's width")
    image_size: int = entry(224, "height and width of the student's picture in pixels")
    segments: tuple[int, int] = entry((2, 2), "rows and columns of segments the image is cut into")
    taps: tuple[int, ...] | None = entry(
        None,
        "depths (1-based) whose features feed the decoders; default: 1/2, 2/3, 5/6, 1 of depth",
    )
    decoder_width: int = entry(1024, "width of both decoders")
    decoder_depth: int = entry(2, "blocks of each decoder")
    decoder_heads: int = entry(32, "attention heads of each decoder")
    cls_mask: str = entry(
        "official", "who sees the CLS token: official (last visible segment), self (only itself)"
    )
    remat: str = entry("none", "what the backward pass recomputes: none, dots, full")
    eps: float = entry(1e-6, "of the encoder's LayerNorms")
    activation: str = entry("gelu", "of the encoder's MLPs: gelu (exact), gelu_tanh, quick_gelu")

    @property
    def grid(self) -> int:
        """Patches along each side of the image."""
        return self.image_size // self.patch

    def resolved(self) -> "Model":
        """The model with size and taps filled in. Raises UserError where numbers do not match."""
        one_of("config.model.size", self.size, SIZES)
        one_of("config.model.cls_mask", self.cls_mask, ("official", "self"))
        one_of("config.model.remat", self.remat, ("none", "dots", "full"))
        one_of("config.model.activation", self.activation, ("gelu", "gelu_tanh", "quick_gelu"))
        sized = dict(zip(("width", "depth", "heads", "patch"), SIZES[self.size], strict=True))
        sized = {k: v for k, v in sized.items() if getattr(self, k) is None}
        model = dataclasses.replace(self, **sized)
        _positive(
            model, "config.model", "depth", "heads", "patch", "image_size", "decoder_depth",
            "decoder_heads",
        )  # fmt: skip
        if model.mlp_ratio <= 0:
            raise UserError(f"config.model.mlp_ratio must be positive, got {model.mlp_ratio}")
        if model.taps is None:
            depths = (max(1, round(model.depth * f)) for f in (1 / 2, 2 / 3, 5 / 6, 1))
            model = dataclasses.replace(model, taps=tuple(dict.fromkeys(depths)))
        taps, depth = model.taps, model.depth
        if list(taps) != sorted(set(taps)) or not taps or taps[0] < 1 or taps[-1] > depth:
            raise UserError(
                f"config.model.taps must increase within 1..{depth} (depth), got {taps}"
            )
        if model.image_size % model.patch:
            raise UserError(
                f"config.model.image_size {model.image_size} is not a multiple of the patch size "
                f"{model.patch}"
            )
        if min(model.segments) < 1 or any(model.grid % s for s in model.segments):
            raise UserError(
                f"config.model.segments {model.segments} do not divide the "
                f"{model.grid}×{model.grid} grid of patches"
            )
        for of in ("", "decoder_"):
            width, heads = getattr(model, f"{of}width"), getattr(model, f"{of}heads")
            if width < 4 or width % 4 or width % heads:
                raise UserError(
                    f"config.model.{of}width {width} must be a multiple of 4 (sin-cos positions) "
                    f"and of {of}heads {heads}"
                )
        return model


@dataclass(frozen=True)
class Data:
    path: str = entry("", "TFDS directory: a token store, or an image dataset")
    examples: int | None = entry(
        None, "examples that it must have, and that a plan without it goes by; default: any number"
    )
    source: str = entry("", "image dataset that a store must be of: NAME or NAME:VERSION")
    split: str = entry("train", "split of an image dataset (a token store's splits are its views)")
    targets: str = entry("stored", "stored (token store), online (live views), pixels (iGPT)")
    views: int | None = entry(None, "use the first so many views of the store; default: all")
    order: str = entry("random", "segment order: random (one an image and step), raster")
    crop_scale: tuple[float, float] = entry((0.2, 1.0), "live views: area of the crop")
    crop_ratio: tuple[float, float] = entry((3 / 4, 4 / 3), "live views: width over height")
    crop_clip: bool = entry(
        False, "live views: cut off what sticks out instead of drawing again, as MAE's probes do"
    )
    flip: bool = entry(True, "live views: mirror half of them")
    threads: int = entry(8, "reading threads of each worker")
    workers: int = entry(0, "worker processes; 0 reads in threads of the training process")
    bad_records: str | None = entry(
        None,
        "error, or skip: damaged records are named, counted and replaced by the next; default: "
        "error for token stores, skip for images",
    )
    bad_most: float = entry(0.001, "share of bad records from which on skipping them is an error")
    cache: str = entry(
        "", "local directory for shards of data on gs:// while they are read; default: temporary"
    )
    lanes: int | None = entry(
        None,
        "data on gs://: parts of the shards that a batch is drawn from, in equal numbers; divides "
        "batch_size, best a multiple of the hosts; default: 16, or what of it divides batch_size",
    )
    window: int = entry(2, "data on gs://: shards that a lane shuffles at a time")


@dataclass(frozen=True)
class Teacher:
    weights: str = entry("", "its weights: .safetensors, .pt, .pth, .bin or a directory with them")
    image_size: int | None = entry(
        None, "input size in pixels; default: the JSON's or the weights'"
    )
    heads: int | None = entry(None, "attention heads; default: from the JSON beside the weights")
    activation: str | None = entry(None, "gelu, gelu_tanh or quick_gelu; default: from the JSON")
    dtype: str = entry("float32", "dtype of the teacher's matmuls: float32 or bfloat16")
    width: int | None = entry(None, "token width a store must have; default: what it has")
    grid: int | None = entry(None, "side of the token grid a store must have; default: what it has")


@dataclass(frozen=True)
class Loss:
    next: float = entry(1.0, "weight of the generative loss (next segment); 0 leaves it out")
    visible: float = entry(1.0, "weight of the discriminative loss (seen segments); 0: left out")


@dataclass(frozen=True)
class Classify:
    weights: str = entry(
        "", "what task=classify starts from: a work directory or weights; empty: random ones"
    )
    num_classes: int = entry(1000, "classes of the data, labels 0 to num_classes - 1")
    pooling: str = entry("mean", "mean (of the patch tokens, then a fresh norm) or cls")
    train: str = entry(
        "all", "all, or head: a linear probe, standardised by batch, on the frozen encoder"
    )
    drop_path: float = entry(0.1, "stochastic depth: rate of the last block, 0 in the first")
    smoothing: float = entry(0.1, "share of a label that is spread over all classes")
    randaugment: str = entry(
        "rand-m9-mstd0.5-inc1", "timm's name of a RandAugment policy; empty: none"
    )
    interpolation: str = entry("bicubic", "of its shifts and turns: bicubic, bilinear or random")
    jitter: tuple[float, float, float] = entry(
        (0.0, 0.0, 0.0), "strengths of random brightness, contrast and saturation"
    )
    erase: float = entry(0.25, "probability that a box of the picture becomes noise")
    mixup: float = entry(0.8, "parameter of mixup's Beta distribution; 0: no mixup")
    cutmix: float = entry(1.0, "the same of cutmix; with both, one of them is drawn")
    mix_group: int = entry(
        128, "neighbouring rows of a batch that are mixed alike: the official code's batch of a GPU"
    )
    resize: int | None = entry(
        None,
        "pixels of the shorter side (or both) before the centre crop of an evaluation; default: "
        "256/224 of image_size, above 224 image_size itself, as the official code has it",
    )

    def resolved(self) -> "Classify":
        """Itself. Raises UserError on values that mean nothing."""
        one_of("config.classify.pooling", self.pooling, ("mean", "cls"))
        one_of("config.classify.train", self.train, ("all", "head"))
        one_of(
            "config.classify.interpolation", self.interpolation, ("bicubic", "bilinear", "random")
        )
        _positive(self, "config.classify", "num_classes", "mix_group")
        for name in ("drop_path", "smoothing", "erase"):
            if not 0 <= getattr(self, name) < 1 + (name == "erase"):
                raise UserError(
                    f"config.classify.{name} must be a share, got {getattr(self, name)}"
                )
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise UserError(
                    f"config.classify.{name} must not be negative, got {getattr(self, name)}"
                )
        if min(self.jitter) < 0:
            raise UserError(f"config.classify.jitter must not be negative, got {self.jitter}")
        return self


@dataclass(frozen=True)
class Optim:
    kind: str = entry("adamw", "adamw; task=classify also: sgd, lars")
    blr: float = entry(1.5e-4, "base learning rate: peak = blr * batch_size / 256")
    warmup: str = entry("40 epochs", "linear warm-up from 0; a duration")
    min_lr: float = entry(0.0, "learning rate at the end of the cosine")
    layer_decay: float = entry(
        1.0, "task=classify: learning rates shrink by this a layer, from the head down"
    )
    weight_decay: float = entry(
        0.05, "decoupled; not on biases and norms, with task=classify nor on positions and CLS"
    )
    b1: float = entry(0.9, "AdamW beta 1; momentum of sgd and lars")
    b2: float = entry(0.95, "AdamW beta 2")
    clip_norm: float = entry(0.0, "clip gradients to this global L2 norm; 0: do not")
    mu_dtype: str = entry("float32", "dtype of the first moment: float32 or bfloat16")
    bad_steps: int = entry(
        10, "stop after so many updates in a row left out for numbers that are not finite"
    )
    spike: float = entry(0.0, "leave out updates at this times the running mean of the loss; 0: no")
    ema: float = entry(
        0.0,
        "decay a step of a moving average of the parameters, which is then what is evaluated "
        "and exported; 0: none",
    )


@dataclass(frozen=True)
class Mesh:
    data: int = entry(-1, "devices along data parallelism; -1: the rest")
    fsdp: int = entry(1, "devices over which parameters are split too")
    tensor: int = entry(1, "devices over which heads and MLP widths are split")


@dataclass(frozen=True)
class Hosts:
    coordinator: str = entry(
        "", "HOST:PORT of process 0; empty: alone, or found by JAX on a cluster"
    )
    processes: int | None = entry(None, "number of processes that must take part")
    process: int | None = entry(None, "number of this one, from 0; with coordinator")
    timeout: int = entry(120, "seconds to wait for all of them")


@dataclass(frozen=True)
class Checkpoint:
    every: str = entry("5 epochs", "duration between checkpoints")
    keep: int = entry(2, "newest checkpoints to keep")
    keep_every: str = entry("", "duration: those at its multiples are kept for ever")
    best: str = entry(
        "",
        "evaluation metric (heldout/visible, knn/cls, val/top1, …) whose best checkpoint is kept "
        "too",
    )


@dataclass(frozen=True)
class Evals:
    every: str = entry("25 epochs", "duration between evaluations; one more at the end")
    heldout: str = entry(
        "",
        "data like data.path that is not trained on: its loss is logged, with task=classify its "
        "accuracy",
    )
    heldout_split: str = entry("test", "its split, where it is an image dataset")
    knn: str = entry("", "labelled TFDS image dataset for the kNN accuracy")
    knn_train: str = entry("train", "split that the neighbours come from, slices allowed")
    knn_test: str = entry("test", "split that is classified, slices allowed")
    knn_resize: int = entry(256, "shorter side in pixels before the centre crop of image_size")
    batch_size: int = entry(256, "examples a step")


@dataclass(frozen=True)
class Train:
    """`python -m dgpt_jax.train`"""

    task: str = entry("pretrain", "pretrain (D-iGPT), or classify: supervised training on labels")
    seed: int = entry(0, "seed of initial weights, data order, views and segment orders")
    total: str = entry("300 epochs", "length of training; a duration")
    batch_size: int = entry(4096, "images an optimizer step, over all devices")
    accum_steps: int = entry(1, "micro-batches that an optimizer step is cut into")
    dtype: str = entry("bfloat16", "dtype of matmuls: bfloat16 or float32 (weights stay float32)")
    log_every: int = entry(50, "steps between log lines")
    profile: tuple[int, int] | None = entry(
        None,
        "START, STOP in steps from where the command begins: what every process traces, into "
        "WORKDIR/profile for TensorBoard; step 0 compiles; default: no trace",
    )
    platform: str = entry("", "cpu, gpu or tpu: fail if it is not there; empty: what JAX finds")
    hosts: Hosts = Hosts()
    model: Model = Model()
    data: Data = Data()
    teacher: Teacher = Teacher()
    loss: Loss = Loss()
    classify: Classify = Classify()
    optim: Optim = Optim()
    mesh: Mesh = Mesh()
    checkpoint: Checkpoint = Checkpoint()
    evals: Evals = Evals()

    def resolved(self) -> "Train":
        """Itself. Raises UserError where values do not go together."""
        one_of("config.task", self.task, ("pretrain", "classify"))
        one_of("config.dtype", self.dtype, ("bfloat16", "float32"))
        one_of("config.data.targets", self.data.targets, ("stored", "online", "pixels"))
        one_of("config.data.order", self.data.order, ("random", "raster"))
        one_of("config.optim.kind", self.optim.kind, ("adamw", "sgd", "lars"))
        one_of("config.data.bad_records", self.data.bad_records, (None, "error", "skip"))
        if not 0 <= self.data.bad_most <= 1:
            raise UserError(f"config.data.bad_most {self.data.bad_most} must be within 0 and 1")
        _crops("config.data", self.data.crop_scale, self.data.crop_ratio)
        _positive(self.data, "config.data", "threads", "window")
        _positive(self, "config", "log_every")
        _positive(self.checkpoint, "config.checkpoint", "keep")
        _positive(self.evals, "config.evals", "batch_size", "knn_resize")
        _seed(self.seed)
        if self.data.workers < 0:
            raise UserError(f"config.data.workers must not be negative, got {self.data.workers}")
        if not self.data.path:
            raise UserError("config.data.path is empty: name the token store or image dataset")
        if self.batch_size < 1 or self.accum_steps < 1 or self.batch_size % self.accum_steps:
            raise UserError(
                f"config.batch_size {self.batch_size} is not divisible by config.accum_steps "
                f"{self.accum_steps}"
            )
        lanes = self.data.lanes
        if lanes is not None and (lanes < 1 or self.batch_size % lanes):
            raise UserError(
                f"config.data.lanes {lanes} does not divide config.batch_size {self.batch_size}"
            )
        if self.profile is not None and not 0 <= self.profile[0] < self.profile[1]:
            raise UserError(
                f"config.profile {self.profile} must be START, STOP in steps, 0 <= START < STOP"
            )
        if not 0 <= self.optim.ema < 1:
            raise UserError(f"config.optim.ema must be within 0 and 1, got {self.optim.ema}")
        if not 0 < self.optim.layer_decay <= 1:
            raise UserError(
                f"config.optim.layer_decay must be above 0, at most 1, got {self.optim.layer_decay}"
            )
        if self.task == "classify":
            self._fit_classify()
        else:
            self._fit_pretrain()
        return self

    def _fit_classify(self):
        task = self.classify
        if self.optim.kind == "lars" and task.train != "head":
            raise UserError("config.optim.kind=lars is for config.classify.train=head")
        if task.train == "head" and (self.optim.layer_decay != 1 or not task.weights):
            raise UserError(
                "config.classify.train=head needs classify.weights and optim.layer_decay=1"
            )
        if (task.mixup or task.cutmix) and (self.batch_size % task.mix_group or task.mix_group % 2):
            raise UserError(
                f"config.classify.mix_group {task.mix_group} must be even and divide "
                f"config.batch_size {self.batch_size}"
            )

    def _fit_pretrain(self):
        if self.optim.layer_decay != 1 or self.optim.kind != "adamw":
            raise UserError("config.optim.layer_decay and kind are for config.task=classify")
        weights = self.loss.next, self.loss.visible
        if min(weights) < 0 or sum(weights) == 0:
            raise UserError(f"config.loss needs a positive weight, got next, visible = {weights}")
        if self.data.targets == "pixels" and self.loss.visible:
            raise UserError("config.data.targets=pixels has no visible loss: set loss.visible to 0")
        if self.model.segments == (1, 1) and self.loss.next:
            raise UserError("config.model.segments (1, 1) has no next segment: set loss.next to 0")
        if self.data.targets == "online" and not self.teacher.weights:
            raise UserError("config.data.targets=online needs config.teacher.weights")


@dataclass(frozen=True)
class Tokens:
    """`python tools/build_tokens.py`"""

    source: str = entry("", "TFDS image dataset directory")
    split: str = entry("train", "its split")
    views: int = entry(1, "views an image; raise it later to add views to a finished store")
    seed: int = entry(0, "views are a function of (seed, index of the image, view)")
    picture_size: int = entry(224, "height and width of the stored picture in pixels")
    picture: str = entry("jpeg95", "jpeg95, webp-lossless or png")
    crop_scale: tuple[float, float] = entry((0.2, 1.0), "area of the crop")
    crop_ratio: tuple[float, float] = entry((3 / 4, 4 / 3), "its width over height")
    flip: bool = entry(True, "mirror half of the views")
    codec: str = entry("int8", "float16, int8 or int4")
    pca: int | None = entry(None, "keep so many principal axes of tokens; default: all channels")
    like: str = entry("", "token store whose codec to take, for a store held out from it")
    batch_size: int = entry(64, "pictures a device and teacher step")
    tensor: int = entry(1, "devices of a process that the teacher's weights are split over")
    shard_size: int = entry(8192, "examples a shard")
    threads: int = entry(8, "threads that decode, crop and encode pictures")
    platform: str = entry("", "cpu, gpu or tpu: fail if it is not there; empty: what JAX finds")
    hosts: Hosts = Hosts()
    teacher: Teacher = Teacher()

    def resolved(self) -> "Tokens":
        """Itself. Raises UserError on values that mean nothing."""
        one_of("config.codec", self.codec, ("float16", "int8", "int4"))
        one_of("config.picture", self.picture, ("jpeg95", "webp-lossless", "png"))
        if not self.source:
            raise UserError("config.source is empty: give the directory of a TFDS image dataset")
        _positive(
            self, "config", "views", "batch_size", "shard_size", "picture_size", "threads", "tensor"
        )
        _seed(self.seed)
        _crops("config", self.crop_scale, self.crop_ratio)
        return self


@dataclass(frozen=True)
class Evaluate:
    """`python -m dgpt_jax.evaluate`"""

    protocol: str = entry("knn", "knn, linear, fewshot or robustness")
    data: str = entry(
        "", "labelled TFDS image dataset; robustness: the directory that holds the test sets"
    )
    train: str = entry("train", "split with the labelled examples, slices allowed")
    test: str = entry("test", "split that is classified, slices allowed")
    features: tuple[str, ...] = entry(
        ("cls", "mean"), "cls, mean (of the patch tokens), or both, each with its own results"
    )
    resize: int = entry(256, "shorter side after resizing, in pixels; then a centre crop")
    squash: bool = entry(False, "resize to a square instead, as the official fine-tuning does")
    shots: tuple[int, ...] = entry((0,), "labels a class; 0: all")
    seeds: tuple[int, ...] = entry((0,), "draws of the labelled examples, where shots > 0")
    k: tuple[int, ...] = entry((10, 20, 100, 200), "kNN: neighbours")
    temperature: float = entry(0.07, "kNN: a neighbour votes exp(similarity / temperature)")
    l2: float = entry(2.0**10, "fewshot: weight of the squared norm of the weights")
    batch_size: int = entry(256, "images a step")
    platform: str = entry("", "cpu, gpu or tpu: fail if it is not there; empty: what JAX finds")
    hosts: Hosts = Hosts()

    def resolved(self) -> "Evaluate":
        """Itself. Raises UserError on values that mean nothing."""
        one_of("config.protocol", self.protocol, ("knn", "linear", "fewshot", "robustness"))
        for name in self.features:
            one_of("config.features", name, ("cls", "mean"))
        if not self.data:
            raise UserError("config.data is empty: give the directory of a labelled TFDS dataset")
        _positive(self, "config", "resize", "batch_size")
        if self.temperature <= 0 or self.l2 <= 0:
            raise UserError("config.temperature and config.l2 must be positive")
        for name in ("features", "shots", "seeds", "k"):
            if not getattr(self, name):
                raise UserError(f"config.{name} is empty: name at least one")
        if min(self.k) < 1 or min(*self.shots, *self.seeds) < 0:
            raise UserError("config.k must be positive, config.shots and seeds not negative")
        return self


def _positive(config, prefix: str, *names: str):
    """Raises UserError about the first of the fields that is less than 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise UserError(f"{prefix}.{name} must be positive, got {getattr(config, name)}")


def _seed(seed: int):
    if seed < 0:
        raise UserError(f"config.seed must not be negative, got {seed}")


def _crops(prefix: str, scale: tuple[float, float], ratio: tuple[float, float]):
    """Raises UserError on bounds of crops that no crop can have."""
    if not 0 < scale[0] <= scale[1] <= 1:
        raise UserError(f"{prefix}.crop_scale {scale} must be LEAST, MOST within 0 and 1")
    if not 0 < ratio[0] <= ratio[1]:
        raise UserError(f"{prefix}.crop_ratio {ratio} must be LEAST, MOST, both positive")


def steps(duration: str, *, batch_size: int, examples: int, total: int | None = None) -> int:
    """A duration as optimizer steps: "300 epochs", "5000 steps", "1e6 examples" or "2%" of total.

    Epochs and examples are converted through `batch_size` and `examples` (dataset length).
    """
    text = duration.strip()
    number, _, unit = text.partition(" ") if not text.endswith("%") else (text[:-1], "", "%")
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    factor = {
        "step": 1.0,
        "epoch": examples / batch_size,
        "example": 1 / batch_size,
        "%": (total or 0) / 100,
    }.get(unit.strip().removesuffix("s"))
    if not 0 <= value < 1e15 or factor is None or (unit == "%" and total is None):
        raise UserError(
            f'cannot read the duration {duration!r}: write "300 epochs", "5000 steps", '
            f'"1000000 examples"' + ("" if total is None else ' or "2%"')
        )
    return int(value * factor)
