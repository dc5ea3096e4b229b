"""Configs: an `ml_collections.ConfigDict` on the outside, frozen dataclasses on the inside.

The dataclasses below are the only list of what can be configured. A config file starts from
`default(Train)` (or `Tokens`, `Evaluate`), so that every field exists and can be overridden on the
command line; `parse` turns the result into the dataclass and refuses what it does not know.
"""

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field

from ml_collections import config_dict


class UserError(Exception):
    """Something the user can mend. Commands print its one line and exit with 1, without traceback."""


def _doc(default, text: str):
    return field(default=default, metadata={"doc": text})


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
    size: str = _doc("B/16", f"one of {', '.join(SIZES)}; sets width, depth, heads and patch")
    width: int | None = _doc(None, "encoder width; default: by size")
    depth: int | None = _doc(None, "encoder blocks; default: by size")
    heads: int | None = _doc(None, "encoder attention heads; default: by size")
    patch: int | None = _doc(None, "patch size in pixels; default: by size")
    mlp_ratio: float = _doc(4.0, "hidden width of every MLP over its block's width")
    image_size: int = _doc(224, "height and width of the student's picture in pixels")
    segments: tuple[int, int] = _doc((2, 2), "rows and columns of segments the image is cut into")
    taps: tuple[int, ...] | None = _doc(
        None, "depths (1-based) whose features feed the decoders; default: 1/2, 2/3, 5/6, 1 of depth"
    )
    decoder_width: int = _doc(1024, "width of both decoders")
    decoder_depth: int = _doc(2, "blocks of each decoder")
    decoder_heads: int = _doc(32, "attention heads of each decoder")
    cls_mask: str = _doc(
        "official", "who sees the CLS token: official (last visible segment), self (only itself)"
    )
    remat: str = _doc("none", "what the backward pass recomputes: none, dots, full")

    @property
    def grid(self) -> int:
        """Patches along each side of the image."""
        return self.image_size // self.patch


@dataclass(frozen=True)
class Data:
    path: str = _doc("", "TFDS directory: a token store, or an image dataset")
    split: str = _doc("train", "split of an image dataset (a token store's splits are its views)")
    targets: str = _doc("stored", "stored (token store), online (live views), pixels (iGPT)")
    views: int | None = _doc(None, "use the first so many views of the store; default: all")
    order: str = _doc("random", "segment order: random (one an image and step), raster")
    crop_scale: tuple[float, float] = _doc((0.2, 1.0), "live views: area of the crop")
    crop_ratio: tuple[float, float] = _doc((3 / 4, 4 / 3), "live views: width over height")
    flip: bool = _doc(True, "live views: mirror half of them")
    threads: int = _doc(8, "reading threads of each worker")
    workers: int = _doc(0, "worker processes; 0 reads in threads of the training process")


@dataclass(frozen=True)
class Teacher:
    weights: str = _doc("", "CLIP weights: .safetensors, .pt, .pth, .bin or a directory with them")
    image_size: int | None = _doc(None, "input size in pixels; default: the JSON's or the weights'")
    heads: int | None = _doc(None, "attention heads; default: from the JSON beside the weights")
    activation: str | None = _doc(None, "gelu or quick_gelu; default: from the JSON")
    dtype: str = _doc("float32", "dtype of the teacher's matmuls: float32 or bfloat16")
    width: int | None = _doc(None, "token width a store must have; default: what it has")
    grid: int | None = _doc(None, "side of the token grid a store must have; default: what it has")


@dataclass(frozen=True)
class Loss:
    next: float = _doc(1.0, "weight of the generative loss (next segment); 0 leaves it out")
    visible: float = _doc(1.0, "weight of the discriminative loss (seen segments); 0: left out")


@dataclass(frozen=True)
class Optim:
    blr: float = _doc(1.5e-4, "base learning rate: peak = blr * batch_size / 256")
    warmup: str = _doc("40 epochs", "linear warm-up from 0; a duration")
    weight_decay: float = _doc(0.05, "decoupled; not on biases and norms")
    b1: float = _doc(0.9, "AdamW beta 1")
    b2: float = _doc(0.95, "AdamW beta 2")
    clip_norm: float = _doc(0.0, "clip gradients to this global L2 norm; 0: do not")
    mu_dtype: str = _doc("float32", "dtype of the first moment: float32 or bfloat16")


@dataclass(frozen=True)
class Mesh:
    data: int = _doc(-1, "devices along data parallelism; -1: the rest")
    fsdp: int = _doc(1, "devices over which parameters are split too")
    tensor: int = _doc(1, "devices over which heads and MLP widths are split")


@dataclass(frozen=True)
class Checkpoint:
    every: str = _doc("5 epochs", "duration between checkpoints")
    keep: int = _doc(2, "newest checkpoints to keep")


@dataclass(frozen=True)
class Evals:
    every: str = _doc("25 epochs", "duration between evaluations; one more at the end")
    heldout: str = _doc("", "data like data.path that is not trained on: its loss is logged")
    heldout_split: str = _doc("test", "its split, where it is an image dataset")
    knn: str = _doc("", "labelled TFDS image dataset for the kNN accuracy")
    knn_train: str = _doc("train", "split that the neighbours come from, slices allowed")
    knn_test: str = _doc("test", "split that is classified, slices allowed")
    knn_resize: int = _doc(256, "shorter side in pixels before the centre crop of image_size")
    batch_size: int = _doc(256, "examples a step")


@dataclass(frozen=True)
class Train:
    """`python -m dgpt_jax.train`"""

    seed: int = _doc(0, "seed of initial weights, data order, views and segment orders")
    total: str = _doc("300 epochs", "length of training; a duration")
    batch_size: int = _doc(4096, "images an optimizer step, over all devices")
    accum_steps: int = _doc(1, "micro-batches that an optimizer step is cut into")
    dtype: str = _doc("bfloat16", "dtype of matmuls: bfloat16 or float32 (weights stay float32)")
    log_every: int = _doc(50, "steps between log lines")
    platform: str = _doc("", "cpu, gpu or tpu: fail if it is not there; empty: what JAX finds")
    model: Model = Model()
    data: Data = Data()
    teacher: Teacher = Teacher()
    loss: Loss = Loss()
    optim: Optim = Optim()
    mesh: Mesh = Mesh()
    checkpoint: Checkpoint = Checkpoint()
    evals: Evals = Evals()


@dataclass(frozen=True)
class Tokens:
    """`python tools/build_tokens.py`"""

    source: str = _doc("", "TFDS image dataset directory")
    split: str = _doc("train", "its split")
    views: int = _doc(1, "views an image; raise it later to add views to a finished store")
    seed: int = _doc(0, "views are a function of (seed, index of the image, view)")
    picture_size: int = _doc(224, "height and width of the stored picture in pixels")
    picture: str = _doc("jpeg95", "jpeg95, webp-lossless or png")
    crop_scale: tuple[float, float] = _doc((0.2, 1.0), "area of the crop")
    crop_ratio: tuple[float, float] = _doc((3 / 4, 4 / 3), "its width over height")
    flip: bool = _doc(True, "mirror half of the views")
    codec: str = _doc("int8", "float16 or int8")
    batch_size: int = _doc(64, "pictures a teacher step")
    shard_size: int = _doc(8192, "examples a shard")
    threads: int = _doc(8, "threads that decode, crop and encode pictures")
    platform: str = _doc("", "cpu, gpu or tpu: fail if it is not there; empty: what JAX finds")
    teacher: Teacher = Teacher()


@dataclass(frozen=True)
class Evaluate:
    """`python -m dgpt_jax.evaluate`"""

    protocol: str = _doc("knn", "knn or linear")
    data: str = _doc("", "labelled TFDS image dataset")
    train: str = _doc("train", "split with the labelled examples, slices allowed")
    test: str = _doc("test", "split that is classified, slices allowed")
    features: str = _doc("cls", "cls or mean (of the patch tokens)")
    resize: int = _doc(256, "shorter side after resizing, in pixels; then a centre crop")
    squash: bool = _doc(False, "resize to a square instead, as the official fine-tuning does")
    shots: tuple[int, ...] = _doc((0,), "labels a class; 0: all")
    seeds: tuple[int, ...] = _doc((0,), "draws of the labelled examples, where shots > 0")
    k: tuple[int, ...] = _doc((10, 20, 100, 200), "kNN: neighbours")
    temperature: float = _doc(0.07, "kNN: a neighbour votes exp(similarity / temperature)")
    batch_size: int = _doc(256, "images a step")
    platform: str = _doc("", "cpu, gpu or tpu: fail if it is not there; empty: what JAX finds")


def default(schema) -> config_dict.ConfigDict:
    """All fields of a schema at their defaults, as a locked ConfigDict for a config file to edit."""
    config = config_dict.ConfigDict()
    for f in dataclasses.fields(schema):
        if dataclasses.is_dataclass(f.type):
            config[f.name] = default(f.type)
        elif f.default is None:  # a placeholder, because a plain None cannot be overridden
            config[f.name] = config_dict.placeholder(_base_type(f.type))
        else:
            config[f.name] = f.default
    return config.lock()


def _base_type(annotation):
    """The runtime type behind `int | None` or `tuple[int, int]`."""
    if isinstance(annotation, types.UnionType):
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    return typing.get_origin(annotation) or annotation


def parse(schema, config, prefix: str = "config"):
    """A ConfigDict (or plain dict, as JSON gives it) as the frozen dataclass `schema`.

    Raises UserError for an unknown key, with the nearest known one, or a value of the wrong type.
    Absent keys take their defaults.
    """
    known = {f.name: f for f in dataclasses.fields(schema)}
    values = {}
    for name, value in dict(config.items()).items():
        if name not in known:
            raise UserError(unknown_key(f"{prefix}.{name}", schema))
        values[name] = _coerce(known[name].type, value, f"{prefix}.{name}")
    parsed = schema(**values)
    check = _CHECKS.get(schema)
    return check(parsed) if check else parsed


def unknown_key(path: str, schema) -> str:
    """The message for a key that `schema` (the dataclass at the key's place) does not have."""
    prefix, _, name = path.rpartition(".")
    names = [f.name for f in dataclasses.fields(schema)]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {prefix}.{near[0]}?" if near else f"known here: {', '.join(names)}"
    return f"unknown config key {path}: {hint}"


def _coerce(annotation, value, path: str):
    if dataclasses.is_dataclass(annotation):
        if not hasattr(value, "items"):
            raise UserError(f"{path} is a group of keys, not a value: got {value!r}")
        return parse(annotation, value, path)
    if value is None and isinstance(annotation, types.UnionType):
        return None
    base = _base_type(annotation)
    if base is tuple and isinstance(value, (list, tuple)):  # JSON turns tuples into lists
        inner = annotation
        if isinstance(annotation, types.UnionType):
            inner = next(a for a in typing.get_args(annotation) if a is not type(None))
        args = typing.get_args(inner)
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise UserError(f"{path} takes {len(args)} values, got {value!r}")
        return tuple(_coerce(args[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    if base is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if base is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, base) or (base is int and isinstance(value, bool)):
        raise UserError(f"{path} must be {base.__name__}, got {value!r}")
    return value


def to_dict(config) -> dict:
    """A parsed config as plain nested dicts, for JSON."""
    return dataclasses.asdict(config)


def flatten(config: dict, prefix: str = "") -> dict:
    """{"model": {"width": 8}} as {"model.width": 8}."""
    flat = {}
    for name, value in config.items():
        path = f"{prefix}{name}"
        flat.update(flatten(value, f"{path}.") if isinstance(value, dict) else {path: value})
    return flat


def _one_of(path: str, value, allowed):
    if value not in allowed:
        raise UserError(f"{path} must be one of {', '.join(map(str, allowed))}, got {value!r}")


def _check_model(model: Model) -> Model:
    """The model with size and taps resolved, after checking that its numbers go together."""
    _one_of("config.model.size", model.size, SIZES)
    _one_of("config.model.cls_mask", model.cls_mask, ("official", "self"))
    _one_of("config.model.remat", model.remat, ("none", "dots", "full"))
    named = dict(zip(("width", "depth", "heads", "patch"), SIZES[model.size], strict=True))
    named = {k: v for k, v in named.items() if getattr(model, k) is None}
    model = dataclasses.replace(model, **named)
    if model.taps is None:
        depths = (max(1, round(model.depth * f)) for f in (1 / 2, 2 / 3, 5 / 6, 1))
        model = dataclasses.replace(model, taps=tuple(dict.fromkeys(depths)))
    if not model.taps or list(model.taps) != sorted(set(model.taps)):
        raise UserError(f"config.model.taps must be increasing depths, got {model.taps}")
    if model.taps[0] < 1 or model.taps[-1] > model.depth:
        raise UserError(f"config.model.taps {model.taps} are not within 1..{model.depth} (depth)")
    if model.image_size % model.patch:
        raise UserError(
            f"config.model.image_size {model.image_size} is not a multiple of the patch size "
            f"{model.patch}"
        )
    if min(model.segments) < 1 or any(model.grid % s for s in model.segments):
        raise UserError(
            f"config.model.segments {model.segments} do not divide the {model.grid}×{model.grid} "
            f"grid of patches"
        )
    for width, heads, what in (
        (model.width, model.heads, "width {} by heads {}"),
        (model.decoder_width, model.decoder_heads, "decoder_width {} by decoder_heads {}"),
    ):
        if width % heads or width % 4:
            raise UserError(
                f"config.model: cannot divide {what.format(width, heads)}"
                if width % heads
                else f"config.model: width {width} is not a multiple of 4 (sin-cos positions)"
            )
    return model


def _check_train(train: Train) -> Train:
    _one_of("config.dtype", train.dtype, ("bfloat16", "float32"))
    _one_of("config.data.targets", train.data.targets, ("stored", "online", "pixels"))
    _one_of("config.data.order", train.data.order, ("random", "raster"))
    if not train.data.path:
        raise UserError("config.data.path is empty: give the directory of a token store or dataset")
    if train.batch_size < 1 or train.accum_steps < 1 or train.batch_size % train.accum_steps:
        raise UserError(
            f"config.batch_size {train.batch_size} is not divisible by config.accum_steps "
            f"{train.accum_steps}"
        )
    if min(train.loss.next, train.loss.visible) < 0 or train.loss.next + train.loss.visible == 0:
        raise UserError(f"config.loss needs a positive weight, got {to_dict(train.loss)}")
    if train.data.targets == "pixels" and train.loss.visible:
        raise UserError("config.data.targets=pixels has no visible loss: set config.loss.visible=0")
    if train.model.segments == (1, 1) and train.loss.next:
        raise UserError("config.model.segments (1, 1) has no next segment: set config.loss.next=0")
    if train.data.targets == "online" and not train.teacher.weights:
        raise UserError("config.data.targets=online needs config.teacher.weights")
    return train


def _check_tokens(tokens: Tokens) -> Tokens:
    _one_of("config.codec", tokens.codec, ("float16", "int8"))
    _one_of("config.picture", tokens.picture, ("jpeg95", "webp-lossless", "png"))
    if not tokens.source:
        raise UserError("config.source is empty: give the directory of a TFDS image dataset")
    if tokens.views < 1:
        raise UserError(f"config.views must be at least 1, got {tokens.views}")
    return tokens


def _check_evaluate(evaluate: Evaluate) -> Evaluate:
    _one_of("config.protocol", evaluate.protocol, ("knn", "linear"))
    _one_of("config.features", evaluate.features, ("cls", "mean"))
    return evaluate


_CHECKS = {
    Model: _check_model,
    Train: _check_train,
    Tokens: _check_tokens,
    Evaluate: _check_evaluate,
}


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
    if value < 0 or factor is None or (unit == "%" and total is None):
        raise UserError(
            f'cannot read the duration {duration!r}: write "300 epochs", "5000 steps", '
            f'"1000000 examples"' + ("" if total is None else ' or "2%"')
        )
    return int(value * factor)
