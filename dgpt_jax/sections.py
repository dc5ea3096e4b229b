"""What configs are made of: a frozen dataclass a section, each field with its type, default and
meaning. config.py puts them together."""

import dataclasses
from dataclasses import dataclass

from dgpt_jax.schema import UserError, entry, one_of, positive

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
        "official",
        "who sees the CLS token: official (last visible segment), self (only itself), all (leaks "
        "later segments to earlier ones; to compare with)",
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
        one_of("config.model.cls_mask", self.cls_mask, ("official", "self", "all"))
        one_of("config.model.remat", self.remat, ("none", "dots", "full"))
        one_of("config.model.activation", self.activation, ("gelu", "gelu_tanh", "quick_gelu"))
        sized = dict(zip(("width", "depth", "heads", "patch"), SIZES[self.size], strict=True))
        sized = {k: v for k, v in sized.items() if getattr(self, k) is None}
        model = dataclasses.replace(self, **sized)
        positive(
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
    prefetch_bytes: int = entry(
        1_000_000_000,
        "bytes of examples that a process, its workers together, reads before they are needed; at "
        "least two batches are",
    )
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
    direct: float = entry(
        0.0,
        "weight of plain feature distillation: the seen tokens, predicted without a decoder by one "
        "linear layer on the last block; 0: left out",
    )


@dataclass(frozen=True)
class Optim:
    kind: str = entry("adamw", "adamw; task=classify also: sgd, lars")
    blr: float = entry(1.5e-4, "base learning rate: peak = blr * batch_size / 256")
    grid: tuple[float, ...] = entry(
        (), "task=classify: base learning rates instead of blr, one for each head of a probe"
    )
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
    threads: int | None = entry(
        None, "reading threads of each process; default: its cores and 4, at most 32"
    )
    most: int | None = entry(None, "take the first so many examples of each; default: all")
    pictures: int = entry(
        8,
        "examples to draw for TensorBoard: crops when a command begins, with task=pretrain what is "
        "predicted of heldout at every evaluation; 0: none",
    )
