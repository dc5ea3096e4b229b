"""What can be configured, and nothing else can: one frozen dataclass a command.

A config file starts from `default(Train)` (or `Tokens`, `Evaluate`), so that every field exists and
can be overridden on the command line; `schema.parse` turns the result into the dataclass.
"""

import dataclasses
from dataclasses import dataclass

from dgpt_jax import durations, supervised
from dgpt_jax.schema import COUNT, NATURAL, POSITIVE, Range, UserError, entry, one_of
from dgpt_jax.sections import Checkpoint, Data, Evals, Hosts, Loss, Mesh, Model, Optim, Teacher
from dgpt_jax.supervised import Classify


@dataclass(frozen=True)
class Train:
    """`python -m dgpt_jax.train`"""

    task: str = entry("pretrain", "pretrain (D-iGPT), or classify: supervised training on labels")
    seed: int = entry(0, "seed of initial weights, data order, views and segment orders", NATURAL)
    total: str = entry("300 epochs", "length of training; a duration")
    batch_size: int = entry(4096, "images an optimizer step, over all devices", COUNT)
    accum_steps: int = entry(1, "micro-batches that an optimizer step is cut into", COUNT)
    dtype: str = entry("bfloat16", "dtype of matmuls: bfloat16 or float32 (weights stay float32)")
    log_every: int = entry(50, "steps between log lines", COUNT)
    profile: tuple[int, int] | None = entry(
        None,
        "START, STOP in steps from where the command begins: what every process traces, into "
        "WORKDIR/profile for TensorBoard; step 0 compiles; default: no trace",
        NATURAL,
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
        _crops("config.data", self.data.crop_scale, self.data.crop_ratio)
        self._check_durations()
        if not self.data.path:
            raise UserError("config.data.path is empty: name the token store or image dataset")
        if self.batch_size % self.accum_steps:
            raise UserError(
                f"config.batch_size {self.batch_size} is not divisible by config.accum_steps "
                f"{self.accum_steps}"
            )
        lanes = self.data.lanes
        if lanes is not None and self.batch_size % lanes:
            raise UserError(
                f"config.data.lanes {lanes} does not divide config.batch_size {self.batch_size}"
            )
        if self.profile is not None and self.profile[0] >= self.profile[1]:
            raise UserError(f"config.profile {self.profile} must be START, STOP in steps")
        if self.task == "classify":
            supervised.fit(self)
        else:
            self._fit_pretrain()
        return self

    def _check_durations(self):
        """Raises UserError where a text is no duration; their lengths need the data's."""
        durations.check(self.total, "config.total", percent=False)
        for section, names in (
            ("optim", ("warmup",)), ("checkpoint", ("every", "keep_every")), ("evals", ("every",)),
        ):  # fmt: skip
            for name in names:
                text = getattr(getattr(self, section), name)
                if text or name != "keep_every":
                    durations.check(text, f"config.{section}.{name}")

    def _fit_pretrain(self):
        optim = self.optim
        if optim.layer_decay != 1 or optim.kind != "adamw" or optim.grid:
            raise UserError("config.optim.layer_decay, kind and grid are for config.task=classify")
        weights = dataclasses.asdict(self.loss)
        if not any(weights.values()):
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

    source: str = entry("", "TFDS image dataset directory", path=True)
    split: str = entry("train", "its split")
    views: int = entry(1, "views an image; raise it later to add views to a finished store", COUNT)
    seed: int = entry(0, "views are a function of (seed, index of the image, view)", NATURAL)
    picture_size: int = entry(224, "height and width of the stored picture in pixels", COUNT)
    picture: str = entry("jpeg95", "jpeg95, webp-lossless or png")
    crop_scale: tuple[float, float] = entry((0.2, 1.0), "area of the crop", Range(above=0, most=1))
    crop_ratio: tuple[float, float] = entry((3 / 4, 4 / 3), "its width over height", POSITIVE)
    flip: bool = entry(True, "mirror half of the views")
    codec: str = entry("int8", "float16, int8 or int4")
    pca: int | None = entry(
        None, "keep so many principal axes of tokens; default: all channels", COUNT
    )
    like: str = entry(
        "", "token store whose codec to take, for a store held out from it", path=True
    )
    batch_size: int = entry(64, "pictures a device and teacher step", COUNT)
    tensor: int = entry(1, "devices of a process that the teacher's weights are split over", COUNT)
    shard_size: int = entry(8192, "examples a shard", COUNT)
    threads: int = entry(8, "threads that decode, crop and encode pictures", COUNT)
    platform: str = entry("", "cpu, gpu or tpu: fail if it is not there; empty: what JAX finds")
    hosts: Hosts = Hosts()
    teacher: Teacher = Teacher()

    def resolved(self) -> "Tokens":
        """Itself. Raises UserError on values that mean nothing."""
        one_of("config.codec", self.codec, ("float16", "int8", "int4"))
        one_of("config.picture", self.picture, ("jpeg95", "webp-lossless", "png"))
        if not self.source:
            raise UserError("config.source is empty: give the directory of a TFDS image dataset")
        _crops("config", self.crop_scale, self.crop_ratio)
        return self


@dataclass(frozen=True)
class Evaluate:
    """`python -m dgpt_jax.evaluate`"""

    protocol: str = entry("knn", "knn, linear, fewshot or robustness")
    data: str = entry(
        "",
        "labelled TFDS image dataset; robustness: the directory that holds the test sets",
        path=True,
    )
    train: str = entry("train", "split with the labelled examples, slices allowed")
    test: str = entry("test", "split that is classified, slices allowed")
    features: tuple[str, ...] = entry(
        ("cls", "mean"), "cls, mean (of the patch tokens), or both, each with its own results"
    )
    resize: int = entry(256, "shorter side after resizing, in pixels; then a centre crop", COUNT)
    squash: bool = entry(False, "resize to a square instead, as the official fine-tuning does")
    shots: tuple[int, ...] = entry((0,), "labels a class; 0: all", NATURAL)
    seeds: tuple[int, ...] = entry((0,), "draws of the labelled examples, where shots > 0", NATURAL)
    k: tuple[int, ...] = entry((10, 20, 100, 200), "kNN: neighbours", COUNT)
    temperature: float = entry(
        0.07, "kNN: a neighbour votes exp(similarity / temperature)", POSITIVE
    )
    l2: float = entry(2.0**10, "fewshot: weight of the squared norm of the weights", POSITIVE)
    batch_size: int = entry(256, "images a step", COUNT)
    threads: int | None = entry(
        None, "reading threads of each process; default: its cores and 4, at most 32", COUNT
    )
    most: int | None = entry(
        None, "take the first so many images of each split; default: all", COUNT
    )
    platform: str = entry("", "cpu, gpu or tpu: fail if it is not there; empty: what JAX finds")
    hosts: Hosts = Hosts()

    def resolved(self) -> "Evaluate":
        """Itself. Raises UserError on values that mean nothing."""
        one_of("config.protocol", self.protocol, ("knn", "linear", "fewshot", "robustness"))
        for name in self.features:
            one_of("config.features", name, ("cls", "mean"))
        if not self.data:
            raise UserError("config.data is empty: give the directory of a labelled TFDS dataset")
        for name in ("features", "shots", "seeds", "k"):
            if not getattr(self, name):
                raise UserError(f"config.{name} is empty: name at least one")
        return self


def _crops(prefix: str, scale: tuple[float, float], ratio: tuple[float, float]):
    """Raises UserError on bounds of crops in the wrong order."""
    for name, (least, most) in (("crop_scale", scale), ("crop_ratio", ratio)):
        if least > most:
            raise UserError(f"{prefix}.{name} ({least}, {most}) must be LEAST, MOST")
