"""What every layout is read into and written from: a model, its flat parameters, how it is used."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from dgpt_jax import digpt, heads, vit
from dgpt_jax.config import Model
from dgpt_jax.convert import layout
from dgpt_jax.convert.layout import Entry
from dgpt_jax.convert.teacher import interpolate_positions
from dgpt_jax.schema import UserError, parse

DECODERS = ("next", "visible", "direct")


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes an encoder's input; the words are timm's.

    crop_mode "center": the shorter side is resized to image_size / crop_pct, then cropped in the
    middle. "squash": both sides are.
    """

    mean: tuple[float, float, float] = vit.IMAGENET_MEAN
    std: tuple[float, float, float] = vit.IMAGENET_STD
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"

    @staticmethod
    def of(told: Mapping) -> "Preprocess":
        """From JSON."""
        return Preprocess(**{n: tuple(v) if isinstance(v, list) else v for n, v in told.items()})


def resized(size: int, crop_pct: float) -> int:
    """To how many pixels pictures are resized before they are cropped; rounded as timm does it."""
    return math.floor(size / crop_pct)


def crop_pct(size: int, edge: int) -> float:
    """The largest number of which `resized` makes the edge."""
    exact = size / edge
    return exact if resized(size, exact) == edge else math.nextafter(exact, 0)


@dataclass(frozen=True)
class Weights:
    """An encoder in use (heads.Classifier), or a whole pretraining model (digpt.DiGPT).

    params: flat, float32. pooling: "cls" or "mean"; None for a pretraining model, which has
    neither learned positions nor a final norm. source: where they came from. run: {"config",
    "step"} of the training, where it is known. notes: what the user should hear. classes: the names
    of a head's classes, in the order of its outputs; empty where they are not known.
    """

    model: Model
    params: dict[str, np.ndarray]
    pooling: str | None
    source: str
    preprocess: Preprocess = Preprocess()
    run: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    @property
    def full(self) -> bool:
        """Whether this is a pretraining model."""
        return self.pooling is None

    @property
    def num_classes(self) -> int:
        return self.params["head/bias"].shape[0] if "head/bias" in self.params else 0

    @property
    def decoders(self) -> tuple[str, ...]:
        return tuple(name for name in DECODERS if f"{name}/pred/kernel" in self.params)

    @property
    def out_width(self) -> int:
        """What the decoders predict."""
        return self.params[f"{self.decoders[0]}/pred/kernel"].shape[1]

    def module(self):
        """The Flax module of the parameters."""
        if not self.full:
            return heads.classifier(self.model, self.pooling, self.num_classes)
        return digpt.build(self.model, out_width=self.out_width, decoders=self.decoders)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """{path: shape} that the parameters of such a module have."""
        if not self.full:
            return encoder_shapes(self.model, self.pooling, self.num_classes)
        return full_shapes(self.model, self.out_width, self.decoders)


@dataclass(frozen=True)
class Layout:
    """A way in which weights are stored.

    found(state, path): whether a file's arrays are of it (state None: path is a directory).
    read(state, path, heads, decoder_heads): Weights. table(weights): its entries, for the same
    parameters. save(weights, path): writes a file, or into an existing directory, whatever else
    belongs to it; raises UserError, before it writes, on what the layout cannot hold. suffixes: of
    the file, the usual one first; none: a directory. full: whether it can hold decoders.
    """

    name: str
    found: Callable[[Mapping | None, Path], bool]
    read: Callable[..., Weights]
    table: Callable[[Weights], list[Entry]]
    save: Callable[[Weights, Path], None] | None = None
    suffixes: tuple[str, ...] = ()
    full: bool = False


def assumed(path, names, whose: str) -> tuple[str, ...]:
    """Notes that preprocessing which nothing beside the weights tells is taken from elsewhere."""
    if not names:
        return ()
    return (f"{path} does not tell its {' and '.join(names)}: {whose} are taken",)


def encoder_model(
    *, width: int, patch: int, heads: int, depth: int, mlp_width: int, image_size: int, **more
) -> Model:
    """The `config.Model` of an encoder that was not pretrained here. Raises UserError."""
    ratio = mlp_width / width
    if int(width * ratio) != mlp_width:  # a hair below, in floating point
        ratio = (mlp_width + 0.5) / width
    return parse(
        Model,
        dict(
            width=width, patch=patch, heads=heads, depth=depth, mlp_ratio=ratio,
            image_size=image_size, segments=(1, 1), **more,
        ),
    )  # fmt: skip


def image_side(positions: int, patch: int, what) -> int:
    """Pixels along a square image from its number of positions, CLS among them."""
    side = round(max(positions - 1, 0) ** 0.5)
    if side * side + 1 != positions:
        raise UserError(f"{what}: {positions} positions are not those of CLS and a square grid")
    return patch * side


def depth_of(state: Mapping, prefix: str, what) -> int:
    """One more than the largest number after the prefix."""
    numbers = [int(n.removeprefix(prefix).split(".")[0]) for n in state if n.startswith(prefix)]
    if not numbers:
        raise UserError(f"{what} has no blocks ({prefix}0.…)")
    return 1 + max(numbers)


def needed(state: Mapping, names, what) -> list[np.ndarray]:
    """The named arrays. Raises UserError where one is missing."""
    missing = [name for name in names if name not in state]
    if missing:
        raise UserError(f"{what}: missing {', '.join(missing)}")
    return [state[name] for name in names]


@lru_cache
def encoder_shapes(model: Model, pooling: str, num_classes: int) -> Mapping[str, tuple[int, ...]]:
    """{path: shape} of heads.Classifier's parameters."""
    module = heads.classifier(model, pooling, num_classes)
    return _shapes(module, digpt.dummy_inputs(model)[:1])


@lru_cache
def full_shapes(
    model: Model, out_width: int, decoders: tuple[str, ...] = ("next", "visible")
) -> Mapping[str, tuple[int, ...]]:
    """{path: shape} of digpt.DiGPT's parameters."""
    module = digpt.build(model, out_width=out_width, decoders=decoders)
    return _shapes(module, digpt.dummy_inputs(model))


def _shapes(module, inputs) -> Mapping[str, tuple[int, ...]]:
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    return MappingProxyType({p: leaf.shape for p, leaf in layout.flatten(params).items()})


def encoder(weights: Weights, pooling: str | None) -> Weights:
    """The encoder of a pretraining model, pooled as told; an encoder as it is.

    Raises UserError where an encoder is pooled otherwise: its last norm stands elsewhere.
    """
    if weights.full:
        nested = layout.unflatten(
            {p: x for p, x in weights.params.items() if p.startswith("encoder/")}
        )
        nested = heads.from_pretrained(nested["encoder"], weights.model)
        params = layout.flatten(nested)
        return dataclasses.replace(weights, params=params, pooling=pooling or "cls")
    if pooling not in (None, weights.pooling):
        raise UserError(f"{weights.source} has pooling {weights.pooling}, not {pooling}")
    return weights


def change(
    weights: Weights,
    *,
    image_size: int | None = None,
    eps: float | None = None,
    activation: str | None = None,
) -> Weights:
    """Weights for another image size, eps or GELU: never done unasked, and said in the notes.

    Positions are resized as timm does it. Raises UserError.
    """
    old = weights.model
    asked = {"image_size": image_size, "eps": eps, "activation": activation}
    asked = {n: v for n, v in asked.items() if v is not None and v != getattr(old, n)}
    if not asked:
        return weights
    model = dataclasses.replace(old, **asked).resolved()
    params, notes = dict(weights.params), []
    if not weights.full and model.grid != old.grid:
        resized = interpolate_positions(
            params["pos_embed"][0], (model.grid, model.grid), cls=True, antialias=True
        )
        params["pos_embed"] = resized[None]
    for name, value in asked.items():
        notes.append(f"{name} is {value}, was {getattr(old, name)}: the encoder is another one")
    return dataclasses.replace(weights, model=model, params=params, notes=(*weights.notes, *notes))
