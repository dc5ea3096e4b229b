"""What can be configured, and nothing else can: one frozen dataclass a command.

A config file starts from `default(Train)` (or `Tokens`, `Evaluate`), so that every field exists and
can be overridden on the command line; `schema.parse` turns the result into the dataclass.
"""

import dataclasses
from dataclasses import dataclass

from dgpt_jax import supervised
from dgpt_jax.schema import UserError, entry, one_of, positive
from dgpt_jax.sections import (
    Checkpoint,
    Data,
    Evals,
    Hosts,
    Loss,
    Mesh,
    Model,
    Optim,
    Teacher,
)
from dgpt_jax.supervised import Classify


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
    wandb: str = entry(
        "", "project of Weights & Biases to show the run in too (extra wandb); empty: none"
    )
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
        positive(self.data, "config.data", "threads", "window", "prefetch_bytes")
        positive(self, "config", "log_every")
        positive(self.checkpoint, "config.checkpoint", "keep")
        positive(self.evals, "config.evals", "batch_size", "knn_resize")
        _positive_if_set(self.evals, "config.evals", "threads", "most")
        if self.evals.pictures < 0:
            raise UserError(f"config.evals.pictures must not be negative: {self.evals.pictures}")
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
            supervised.fit(self)
        else:
            self._fit_pretrain()
        return self

    def _fit_pretrain(self):
        optim = self.optim
        if optim.layer_decay != 1 or optim.kind != "adamw" or optim.grid:
            raise UserError("config.optim.layer_decay, kind and grid are for config.task=classify")
        weights = dataclasses.asdict(self.loss)
        if min(weights.values()) < 0 or not any(weights.values()):
            raise UserError(f"config.loss needs a positive weight, got {weights}")
        for name in ("visible", "direct"):
            if self.data.targets == "pixels" and weights[name]:
                raise UserError(f"config.data.targets=pixels has only next: set loss.{name} to 0")
        if self.loss.direct and self.model.taps[-1] != self.model.depth:
            raise UserError(
                f"config.loss.direct reads the last block: config.model.taps must end with "
                f"{self.model.depth} (depth), got {self.model.taps}"
            )
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
        positive(
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
    threads: int | None = entry(
        None, "reading threads of each process; default: its cores and 4, at most 32"
    )
    most: int | None = entry(None, "take the first so many images of each split; default: all")
    platform: str = entry("", "cpu, gpu or tpu: fail if it is not there; empty: what JAX finds")
    hosts: Hosts = Hosts()

    def resolved(self) -> "Evaluate":
        """Itself. Raises UserError on values that mean nothing."""
        one_of("config.protocol", self.protocol, ("knn", "linear", "fewshot", "robustness"))
        for name in self.features:
            one_of("config.features", name, ("cls", "mean"))
        if not self.data:
            raise UserError("config.data is empty: give the directory of a labelled TFDS dataset")
        positive(self, "config", "resize", "batch_size")
        _positive_if_set(self, "config", "threads", "most")
        if self.temperature <= 0 or self.l2 <= 0:
            raise UserError("config.temperature and config.l2 must be positive")
        for name in ("features", "shots", "seeds", "k"):
            if not getattr(self, name):
                raise UserError(f"config.{name} is empty: name at least one")
        if min(self.k) < 1 or min(*self.shots, *self.seeds) < 0:
            raise UserError("config.k must be positive, config.shots and seeds not negative")
        return self


def _seed(seed: int):
    if seed < 0:
        raise UserError(f"config.seed must not be negative, got {seed}")


def _positive_if_set(section, prefix: str, *names: str):
    positive(section, prefix, *(name for name in names if getattr(section, name) is not None))


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
