"""Root configs of the commands: TrainConfig, TokensConfig and EvaluateConfig.

A config file starts from `default_config(TrainConfig)`, so every field exists and can be overridden
on the command line; `schema.parse` converts the result to the dataclass.
"""

from dataclasses import dataclass

from dgpt_jax.config import classification, durations, initialization, pretraining
from dgpt_jax.config.classification import ClassificationConfig
from dgpt_jax.config.data import (
    AREA,
    CODECS,
    FIRST,
    DataConfig,
    FurtherTeacherConfig,
    TeacherConfig,
)
from dgpt_jax.config.initialization import InitConfig
from dgpt_jax.config.model import ModelConfig
from dgpt_jax.config.optimization import LossConfig, OptimConfig
from dgpt_jax.config.ranges import COUNT, NATURAL, POSITIVE
from dgpt_jax.config.run import CheckpointConfig, EvalsConfig, HostsConfig, MeshConfig
from dgpt_jax.config.schema import check_choice, field, named_group
from dgpt_jax.errors import UserError

PLATFORM = "cpu, gpu or tpu, an error if unavailable; empty: JAX's default"
THREADS = "reader threads per process; default: number of cores + 4, at most 32"
KERNELS = ("auto", "xla", "cudnn", "ours")
KERNELS_HELP = (
    "implementation of attention and LayerNorm: ours (our TPU and GPU kernels), xla, cudnn (GPUs, "
    "attention only), or auto: ours where they match XLA on this device, checked at start"
)


@dataclass(frozen=True)
class TrainConfig:
    """Config of `python -m dgpt_jax.train`."""

    task: str = field("pretrain", "pretrain (D-iGPT) or classify (supervised training)")
    seed: int = field(
        0, "seed of initial parameters, data order, views and segment orders", NATURAL
    )
    total: str = field(
        "300 epochs", 'training length; a duration: "300 epochs", "5000 steps", "1e6 examples"'
    )
    batch_size: int = field(4096, "images per optimizer step, over all devices", COUNT)
    accum_steps: int = field(
        1, "micro-batches per optimizer step, for gradient accumulation", COUNT
    )
    dtype: str = field("bfloat16", "dtype of matmuls: bfloat16 or float32; parameters are float32")
    log_every: int = field(50, "steps between log lines", COUNT)
    profile: tuple[int, int] | None = field(
        None,
        "START, STOP: steps of this command that every process traces to WORKDIR/profile, for "
        "TensorBoard; step 0 compiles; default: no trace",
        NATURAL,
    )
    platform: str = field("", PLATFORM)
    kernels: str = field("auto", KERNELS_HELP)
    wandb: str = field(
        "", "Weights & Biases project that also logs the run (extra wandb); empty: none"
    )
    hosts: HostsConfig = HostsConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    teacher: TeacherConfig = TeacherConfig()
    teachers: dict[str, FurtherTeacherConfig] = named_group(
        FurtherTeacherConfig,
        "a further teacher of the token store, which is trained on too; its loss_weight, width and "
        "grid are read",
    )
    init: InitConfig = InitConfig()
    loss: LossConfig = LossConfig()
    classify: ClassificationConfig = ClassificationConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evals: EvalsConfig = EvalsConfig()

    def resolved(self) -> "TrainConfig":
        """Returns the config itself. Raises UserError if values do not fit together."""
        _check_platform(self.platform, self.kernels)
        check_choice("config.task", self.task, ("pretrain", "classify"))
        check_choice("config.dtype", self.dtype, ("bfloat16", "float32"))
        check_choice("config.data.targets", self.data.targets, ("stored", "online", "pixels"))
        check_choice("config.data.order", self.data.order, ("random", "raster"))
        check_choice("config.optim.kind", self.optim.kind, ("adamw", "sgd", "lars"))
        check_choice("config.data.bad_records", self.data.bad_records, (None, "error", "skip"))
        _check_crops("config.data", self.data.crop_scale, self.data.crop_ratio)
        self._check_durations()
        if not self.data.path:
            raise UserError("config.data.path is empty: set it to a token store or image dataset")
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
        initialization.check_init(self)
        if self.task == "classify":
            classification.check_classification(self)
        else:
            pretraining.check_pretraining(self)
        return self

    def _check_durations(self) -> None:
        """Raises UserError on invalid durations; their number of steps depends on the data."""
        durations.check(self.total, "config.total", percent=False)
        for section, names in (
            ("optim", ("warmup",)), ("checkpoint", ("every", "keep_every")), ("evals", ("every",)),
            ("init", ("freeze_steps",)),
        ):  # fmt: skip
            for name in names:
                text = getattr(getattr(self, section), name)
                if text or name not in ("keep_every", "freeze_steps"):
                    durations.check(text, f"config.{section}.{name}")
        durations.check_shorter(
            self.optim.warmup, "config.optim.warmup", self.total, "config.total", self.batch_size
        )


@dataclass(frozen=True)
class TokensConfig:
    """Config of `python tools/build_tokens.py`."""

    source: str = field("", "TFDS image dataset directory", path=True)
    split: str = field("train", "split of the source; slices allowed")
    views: int = field(
        1, "views per image; increase it later to add views to a finished store", COUNT
    )
    seed: int = field(0, "seed of views, which depend on (seed, image index, view)", NATURAL)
    image_size: int = field(224, "height and width of stored images in pixels", COUNT)
    image_encoding: str = field("jpeg95", "encoding of stored images: jpeg95, webp-lossless or png")
    crop_scale: tuple[float, float] = field(
        (0.2, 1.0), "range of the crop's share of the image area", AREA
    )
    crop_ratio: tuple[float, float] = field(
        (3 / 4, 4 / 3), "range of the crop's aspect ratio, width / height", POSITIVE
    )
    flip: bool = field(True, "random horizontal flips")
    codec: str = field("int8", "encoding of stored tokens: float16, int8 or int4")
    pca: int | None = field(
        None, "number of principal components of tokens to store; default: all channels", COUNT
    )
    codec_from: str = field(
        "", "token store whose codec is reused, for held-out data; empty: fit a new one", path=True
    )
    batch_size: int = field(64, "images per device and teacher step", COUNT)
    tensor: int = field(1, "devices of a process that shard the teacher's weights", COUNT)
    shard_size: int = field(8192, "examples per shard", COUNT)
    threads: int = field(8, "threads that decode, crop and encode images", COUNT)
    platform: str = field("", PLATFORM)
    kernels: str = field("auto", KERNELS_HELP)
    hosts: HostsConfig = HostsConfig()
    teacher: TeacherConfig = TeacherConfig()
    teachers: dict[str, FurtherTeacherConfig] = named_group(
        FurtherTeacherConfig,
        "a further teacher, whose tokens lie beside those of config.teacher; its keys are those of "
        "config.teacher, codec and pca",
    )

    def resolved(self) -> "TokensConfig":
        """Returns the config itself. Raises UserError on invalid values."""
        _check_platform(self.platform, self.kernels)
        check_choice("config.codec", self.codec, CODECS)
        check_choice(
            "config.image_encoding", self.image_encoding, ("jpeg95", "webp-lossless", "png")
        )
        if not self.source:
            raise UserError("config.source is empty: set it to a TFDS image dataset")
        _check_crops("config", self.crop_scale, self.crop_ratio)
        for name, teacher in self.teachers.items():
            if name == FIRST:
                raise UserError(f"config.teachers.{FIRST}: that is the name of config.teacher")
            if not teacher.weights:
                raise UserError(f"config.teachers.{name}.weights is empty")
        return self


@dataclass(frozen=True)
class EvaluateConfig:
    """Config of `python -m dgpt_jax.evaluate`."""

    protocol: str = field("knn", "knn, linear, fewshot or robustness")
    data: str = field(
        "",
        "labeled TFDS image dataset; robustness: the directory of the test sets",
        path=True,
    )
    train: str = field("train", "split of the labeled examples; slices allowed")
    test: str = field("test", "split that is classified; slices allowed")
    features: tuple[str, ...] = field(
        ("cls", "mean"), "cls, mean (of patch tokens) or both, each with its own results"
    )
    resize: int = field(256, "shorter side in pixels before the center crop", COUNT)
    squash: bool = field(False, "resize to a square instead, like the official fine-tuning")
    shots: tuple[int, ...] = field((0,), "labeled examples per class; 0: all", NATURAL)
    seeds: tuple[int, ...] = field(
        (0,), "seeds for drawing the labeled examples if shots > 0", NATURAL
    )
    k: tuple[int, ...] = field((10, 20, 100, 200), "kNN: numbers of neighbors", COUNT)
    temperature: float = field(
        0.07, "kNN: a neighbor's vote has the weight exp(similarity / temperature)", POSITIVE
    )
    l2: float = field(
        2.0**10,
        "fewshot: L2 regularization, the factor of the squared norm of the weights",
        POSITIVE,
    )
    batch_size: int = field(256, "images per step", COUNT)
    threads: int | None = field(None, THREADS, COUNT)
    max_examples: int | None = field(
        None, "use only the first images of each split, this many; default: all", COUNT
    )
    platform: str = field("", PLATFORM)
    kernels: str = field("auto", KERNELS_HELP)
    hosts: HostsConfig = HostsConfig()

    def resolved(self) -> "EvaluateConfig":
        """Returns the config itself. Raises UserError on invalid values."""
        _check_platform(self.platform, self.kernels)
        check_choice("config.protocol", self.protocol, ("knn", "linear", "fewshot", "robustness"))
        for name in self.features:
            check_choice("config.features", name, ("cls", "mean"))
        if not self.data:
            raise UserError("config.data is empty: set it to a labeled TFDS dataset")
        for name in ("features", "shots", "seeds", "k"):
            if not getattr(self, name):
                raise UserError(f"config.{name} is empty: list at least one value")
        return self


def _check_platform(platform: str, kernels: str) -> None:
    if platform:
        check_choice("config.platform", platform, ("cpu", "gpu", "tpu"))
    check_choice("config.kernels", kernels, KERNELS)


def _check_crops(prefix: str, scale: tuple[float, float], ratio: tuple[float, float]) -> None:
    """Raises UserError on bounds of crops in the wrong order."""
    for name, (low, high) in (("crop_scale", scale), ("crop_ratio", ratio)):
        if low > high:
            raise UserError(f"{prefix}.{name} ({low}, {high}) must be MIN, MAX")
