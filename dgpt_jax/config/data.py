"""Configs of the training data and of the teacher that made, or makes, its targets."""

import dataclasses
from dataclasses import dataclass

from dgpt_jax.config.ranges import COUNT, NATURAL, POSITIVE, SHARE, Range
from dgpt_jax.config.schema import check_choice, field
from dgpt_jax.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# For images in [0, 1]; statistics of images in [0, 255] are out of range.
MEAN = Range(least=0, most=1)
STD = Range(above=0, most=10)
AREA = Range(above=0, most=1)
CODECS = ("float16", "int8", "int4")
NORMALIZE = ("none", "center", "whiten", "pca_whiten")
FIRST = "teacher"  # name of the teacher of section `teacher`; others have groups in `teachers`


@dataclass(frozen=True)
class DataConfig:
    """Section `data`."""

    path: str = field("", "TFDS directory: a token store, or an image dataset", path=True)
    examples: int | None = field(
        None, "expected number of examples; plan uses it if there are no data; default: any", COUNT
    )
    source: str = field(
        "", "image dataset that the token store must come from: NAME or NAME:VERSION; empty: any"
    )
    split: str = field("train", "split of an image dataset (a token store has a split per view)")
    targets: str = field(
        "stored", "stored (of a token store), online (teacher on live views) or pixels (iGPT)"
    )
    views: int | None = field(None, "number of the store's views to use; default: all", COUNT)
    order: str = field("random", "segment order: random (drawn per image and step) or raster")
    crop_scale: tuple[float, float] = field(
        (0.2, 1.0), "live views: range of the crop's share of the image area", AREA
    )
    crop_ratio: tuple[float, float] = field(
        (3 / 4, 4 / 3), "live views: range of the crop's aspect ratio, width / height", POSITIVE
    )
    crop_clip: bool = field(
        False,
        "live views: clip crops at the image border instead of drawing new ones, like MAE's probes",
    )
    flip: bool = field(True, "live views: random horizontal flips")
    mean: tuple[float, float, float] = field(
        IMAGENET_MEAN,
        "mean (R, G, B) that is subtracted from the student's images in [0, 1]; the teacher's is "
        "teacher.mean",
        MEAN,
    )
    std: tuple[float, float, float] = field(
        IMAGENET_STD, "standard deviation that the student's images are then divided by", STD
    )
    threads: int = field(8, "reader threads per worker", COUNT)
    workers: int = field(0, "worker processes; 0: reader threads in the training process", NATURAL)
    prefetch_bytes: int = field(
        1_000_000_000,
        "bytes of examples that a process, with its workers, prefetches; at least two batches",
        COUNT,
    )
    bad_records: str | None = field(
        None,
        "what damaged records cause: error, or skip (they are reported, counted and replaced by "
        "the next record); default: error for token stores, skip for images",
    )
    max_bad_fraction: float = field(
        0.001, "fraction of bad records above which skipping them becomes an error", SHARE
    )
    cache: str = field(
        "",
        "data on gs://: local directory for prefetched shards; empty: the system's temporary one",
        path=True,
    )
    lanes: int | None = field(
        None,
        "data on gs://: groups of shards that are read in parallel, each for an equal share of the "
        "batch; must divide batch_size, best a multiple of the number of hosts; default: 16, or "
        "its greatest common divisor with batch_size",
        COUNT,
    )
    window: int = field(2, "data on gs://: shards that a lane shuffles together", COUNT)


@dataclass(frozen=True)
class TeacherConfig:
    """Section `teacher`."""

    weights: str = field(
        "",
        "teacher weights: hf:ORG/NAME on the Hugging Face hub, or .safetensors, .pt, .pth, .bin or "
        ".ckpt (FILE#KEY: one of several state dicts), or a directory of them",
        path=True,
    )
    image_size: int | None = field(
        None, "input size in pixels; default: from the JSON beside the weights, or the weights",
        COUNT,
    )  # fmt: skip
    heads: int | None = field(
        None, "attention heads; default: from the JSON beside the weights", COUNT
    )
    activation: str | None = field(
        None, "gelu, gelu_tanh or quick_gelu; default: from the JSON beside the weights"
    )
    mean: tuple[float, ...] | None = field(
        None,
        "mean that is subtracted from images in [0, 1]: R, G, B, or one value for all channels; "
        "default: from the weights or the JSON beside them",
        MEAN,
    )
    std: tuple[float, ...] | None = field(
        None, "standard deviation that images are then divided by, in the same form", STD
    )
    dtype: str = field("float32", "dtype of the teacher's matmuls: float32 or bfloat16")
    width: int | None = field(None, "expected token width of a store; default: any", COUNT)
    grid: int | None = field(
        None, "expected tokens along each side of a store's token grid; default: any", COUNT
    )
    normalize: str = field(
        "none",
        "targets in training: none, center (minus their mean), whiten (also over the standard "
        "deviation of each channel) or pca_whiten (of each principal axis)",
    )
    loss_weight: float = field(
        1.0,
        "weight of the losses to this teacher's tokens, relative to the other teachers'; 0 leaves "
        "it out of the model",
        NATURAL,
    )

    def resolved(self) -> "TeacherConfig":
        """Returns the config with three values in mean and std. Raises UserError on other lengths
        than 1 or 3."""
        check_choice("config.teacher.normalize", self.normalize, NORMALIZE)
        channels = {}
        for name in ("mean", "std"):
            value = getattr(self, name)
            if value is not None and len(value) not in (1, 3):
                raise UserError(
                    f"config.teacher.{name} takes 3 values, or one for all channels, got {value!r}"
                )
            channels[name] = value * 3 if value is not None and len(value) == 1 else value
        return dataclasses.replace(self, **channels)


@dataclass(frozen=True)
class FurtherTeacherConfig(TeacherConfig):
    """A group of section `teachers`: a teacher beside the first, `config.teachers.NAME`."""

    codec: str = field("int8", "encoding of its stored tokens: float16, int8 or int4")
    pca: int | None = field(
        None, "number of principal components of its tokens to store; default: all", COUNT
    )

    def resolved(self) -> "FurtherTeacherConfig":
        """Returns the config as TeacherConfig does. Raises UserError."""
        check_choice("codec of a teacher in config.teachers", self.codec, CODECS)
        return super().resolved()  # pyright: ignore[reportReturnType]  # replace keeps the class
