"""What configs are made of: a frozen dataclass a section, each field with its type, default and
meaning. config.py puts them together."""

import dataclasses
from dataclasses import dataclass

from dgpt_jax.schema import (
    BELOW_1,
    COUNT,
    NATURAL,
    POSITIVE,
    SHARE,
    Range,
    UserError,
    entry,
    one_of,
)

# width, depth, heads, patch size in pixels.
SIZES = {
    "S/16": (384, 12, 6, 16),
    "B/16": (768, 12, 12, 16),
    "L/16": (1024, 24, 16, 16),
    "L/14": (1024, 24, 16, 14),
    "H/14": (1280, 32, 16, 14),
}
# Of pictures in [0, 1]; what is of 0 to 255 lies outside.
MEAN = Range(least=0, most=1)
STD = Range(above=0, most=10)


@dataclass(frozen=True)
class Model:
    size: str = entry("B/16", f"one of {', '.join(SIZES)}; sets width, depth, heads and patch")
    width: int | None = entry(None, "encoder width; default: by size", Range(least=4))
    depth: int | None = entry(None, "encoder blocks; default: by size", COUNT)
    heads: int | None = entry(None, "encoder attention heads; default: by size", COUNT)
    patch: int | None = entry(None, "patch size in pixels; default: by size", COUNT)
    mlp_ratio: float = entry(4.0, "hidden width of every MLP over its block's width", POSITIVE)
    image_size: int = entry(224, "height and width of the student's picture in pixels", COUNT)
    segments: tuple[int, int] = entry(
        (2, 2), "rows and columns of segments the image is cut into", COUNT
    )
    taps: tuple[int, ...] | None = entry(
        None,
        "depths (1-based) whose features feed the decoders; default: 1/2, 2/3, 5/6, 1 of depth",
        COUNT,
    )
    decoder_width: int = entry(1024, "width of both decoders", Range(least=4))
    decoder_depth: int = entry(2, "blocks of each decoder", COUNT)
    decoder_heads: int = entry(32, "attention heads of each decoder", COUNT)
    cls_mask: str = entry(
        "official",
        "who sees the CLS token: official (last visible segment), self (only itself), all (leaks "
        "later segments to earlier ones; to compare with)",
    )
    remat: str = entry("none", "what the backward pass recomputes: none, dots, full")
    eps: float = entry(1e-6, "of the encoder's LayerNorms", Range(above=0, below=1))
    activation: str = entry("gelu", "of the encoder's MLPs: gelu (exact), gelu_tanh, quick_gelu")

    @property
    def grid(self) -> int:
        """Patches along each side of the image."""
        return self.image_size // self.patch

    def resolved(self) -> "Model":
        """The model with size and taps filled in. Raises UserError where numbers do not match."""
        one_of("config.model.size", self.size, SIZES)
        one_of("config.model.cls_mask", self.cls_mask, ("official", "self", "all"))
        one_of("config.model.remat", self.remat, ("none", "dots", "full"))
        one_of("config.model.activation", self.activation, ("gelu", "gelu_tanh", "quick_gelu"))
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
        for of in ("", "decoder_"):
            width, heads = getattr(model, f"{of}width"), getattr(model, f"{of}heads")
            if width % 4 or width % heads:
                raise UserError(
                    f"config.model.{of}width {width} must be a multiple of 4 (sin-cos positions) "
                    f"and of {of}heads {heads}"
                )
        return model


@dataclass(frozen=True)
class Data:
    path: str = entry("", "TFDS directory: a token store, or an image dataset", path=True)
    examples: int | None = entry(
        None,
        "examples that it must have, and that a plan without it goes by; default: any number",
        COUNT,
    )
    source: str = entry("", "image dataset that a store must be of: NAME or NAME:VERSION")
    split: str = entry("train", "split of an image dataset (a token store's splits are its views)")
    targets: str = entry("stored", "stored (token store), online (live views), pixels (iGPT)")
    views: int | None = entry(None, "use the first so many views of the store; default: all", COUNT)
    order: str = entry("random", "segment order: random (one an image and step), raster")
    crop_scale: tuple[float, float] = entry(
        (0.2, 1.0), "live views: area of the crop", Range(above=0, most=1)
    )
    crop_ratio: tuple[float, float] = entry(
        (3 / 4, 4 / 3), "live views: width over height", POSITIVE
    )
    crop_clip: bool = entry(
        False, "live views: cut off what sticks out instead of drawing again, as MAE's probes do"
    )
    flip: bool = entry(True, "live views: mirror half of them")
    threads: int = entry(8, "reading threads of each worker", COUNT)
    workers: int = entry(0, "worker processes; 0 reads in threads of the training process", NATURAL)
    prefetch_bytes: int = entry(
        1_000_000_000,
        "bytes of examples that a process, its workers together, reads before they are needed; at "
        "least two batches are",
        COUNT,
    )
    bad_records: str | None = entry(
        None,
        "error, or skip: damaged records are named, counted and replaced by the next; default: "
        "error for token stores, skip for images",
    )
    bad_most: float = entry(
        0.001, "share of bad records from which on skipping them is an error", SHARE
    )
    cache: str = entry(
        "",
        "local directory for shards of data on gs:// while they are read; default: temporary",
        path=True,
    )
    lanes: int | None = entry(
        None,
        "data on gs://: parts of the shards that a batch is drawn from, in equal numbers; divides "
        "batch_size, best a multiple of the hosts; default: 16, or what of it divides batch_size",
        COUNT,
    )
    window: int = entry(2, "data on gs://: shards that a lane shuffles at a time", COUNT)


@dataclass(frozen=True)
class Teacher:
    weights: str = entry(
        "",
        "its weights: .safetensors, .pt, .pth, .bin, .ckpt (FILE#KEY: one of several state dicts), "
        "or a directory with them",
        path=True,
    )
    image_size: int | None = entry(
        None, "input size in pixels; default: the JSON's or the weights'", COUNT
    )
    heads: int | None = entry(
        None, "attention heads; default: from the JSON beside the weights", COUNT
    )
    activation: str | None = entry(None, "gelu, gelu_tanh or quick_gelu; default: from the JSON")
    mean: tuple[float, ...] | None = entry(
        None,
        "of its pictures in [0, 1], what is subtracted: R, G, B, or one number for all three; "
        "default: as the weights or the JSON beside them say",
        MEAN,
    )
    std: tuple[float, ...] | None = entry(None, "what they are then divided by; likewise", STD)
    dtype: str = entry("float32", "dtype of the teacher's matmuls: float32 or bfloat16")
    width: int | None = entry(None, "token width a store must have; default: what it has", COUNT)
    grid: int | None = entry(
        None, "side of the token grid a store must have; default: what it has", COUNT
    )

    def resolved(self) -> "Teacher":
        """Mean and std with three numbers each. Raises UserError on other lengths."""
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
class Loss:
    next: float = entry(
        1.0, "weight of the generative loss (next segment); 0 leaves it out", NATURAL
    )
    visible: float = entry(
        1.0, "weight of the discriminative loss (seen segments); 0: left out", NATURAL
    )
    direct: float = entry(
        0.0,
        "weight of plain feature distillation: the seen tokens, predicted without a decoder by one "
        "linear layer on the last block; 0: left out",
        NATURAL,
    )


@dataclass(frozen=True)
class Optim:
    kind: str = entry("adamw", "adamw; task=classify also: sgd, lars")
    blr: float = entry(1.5e-4, "base learning rate: peak = blr * batch_size / 256", NATURAL)
    grid: tuple[float, ...] = entry(
        (),
        "task=classify: base learning rates instead of blr, one for each head of a probe",
        POSITIVE,
    )
    warmup: str = entry("40 epochs", "linear warm-up from 0; a duration")
    min_lr: float = entry(0.0, "learning rate at the end of the cosine", NATURAL)
    layer_decay: float = entry(
        1.0,
        "task=classify: learning rates shrink by this a layer, from the head down",
        Range(above=0, most=1),
    )
    weight_decay: float = entry(
        0.05,
        "decoupled; not on biases and norms, with task=classify nor on positions and CLS",
        NATURAL,
    )
    b1: float = entry(0.9, "AdamW beta 1; momentum of sgd and lars", BELOW_1)
    b2: float = entry(0.95, "AdamW beta 2", BELOW_1)
    clip_norm: float = entry(0.0, "clip gradients to this global L2 norm; 0: do not", NATURAL)
    mu_dtype: str = entry("float32", "dtype of the first moment: float32 or bfloat16")
    bad_steps: int = entry(
        10, "stop after so many updates in a row left out for numbers that are not finite", COUNT
    )
    spike: float = entry(
        0.0,
        "leave out updates at this times the running mean of the loss; 0: no",
        Range(above=1, also=(0,)),
    )
    ema: float = entry(
        0.0,
        "decay a step of a moving average of the parameters, which is then what is evaluated "
        "and exported; 0: none",
        BELOW_1,
    )


@dataclass(frozen=True)
class Mesh:
    data: int = entry(
        -1, "devices along data parallelism; -1: the rest", Range(least=1, also=(-1,))
    )
    fsdp: int = entry(1, "devices over which parameters are split too", Range(least=1, also=(-1,)))
    tensor: int = entry(
        1, "devices over which heads and MLP widths are split", Range(least=1, also=(-1,))
    )


@dataclass(frozen=True)
class Hosts:
    coordinator: str = entry(
        "", "HOST:PORT of process 0; empty: alone, or found by JAX on a cluster"
    )
    processes: int | None = entry(None, "number of processes that must take part", COUNT)
    process: int | None = entry(None, "number of this one, from 0; with coordinator", NATURAL)
    timeout: int = entry(120, "seconds to wait for all of them", COUNT)


@dataclass(frozen=True)
class Checkpoint:
    every: str = entry("5 epochs", "duration between checkpoints")
    keep: int = entry(2, "newest checkpoints to keep", COUNT)
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
        path=True,
    )
    heldout_split: str = entry("test", "its split, where it is an image dataset")
    knn: str = entry("", "labelled TFDS image dataset for the kNN accuracy", path=True)
    knn_train: str = entry("train", "split that the neighbours come from, slices allowed")
    knn_test: str = entry("test", "split that is classified, slices allowed")
    knn_resize: int = entry(
        256, "shorter side in pixels before the centre crop of image_size", COUNT
    )
    batch_size: int = entry(256, "examples a step", COUNT)
    threads: int | None = entry(
        None, "reading threads of each process; default: its cores and 4, at most 32", COUNT
    )
    most: int | None = entry(None, "take the first so many examples of each; default: all", COUNT)
    pictures: int = entry(
        8,
        "examples to draw for TensorBoard: crops when a command begins, with task=pretrain what is "
        "predicted of heldout at every evaluation; 0: none",
        NATURAL,
    )
