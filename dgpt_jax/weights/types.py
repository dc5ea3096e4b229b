"""Types that every layout reads into and writes from: model, flat parameters, preprocessing."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from dgpt_jax.config import ModelConfig
from dgpt_jax.config.schema import parse
from dgpt_jax.data import normalization
from dgpt_jax.errors import UserError
from dgpt_jax.models import classifier, digpt
from dgpt_jax.weights import mapping
from dgpt_jax.weights.mapping import ArrayEntry
from dgpt_jax.weights.positions import bicubic_antialiased

DECODERS = digpt.DECODERS
# Parameters of predictions for further teachers, by digpt.join.
_FURTHER = re.compile(rf"(?:{'|'.join(DECODERS)})(?:/pred)?_(\w+)/")


@dataclass(frozen=True)
class Preprocess:
    """Preprocessing of an encoder's input images, in timm's terms.

    crop_mode "center": the shorter side is resized to image_size / crop_pct, then the center is
    cropped. "squash": both sides are resized to it.
    """

    mean: tuple[float, float, float] = normalization.IMAGENET_MEAN
    std: tuple[float, float, float] = normalization.IMAGENET_STD
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> "Preprocess":
        """Inverse of dataclasses.asdict, with lists for tuples."""
        options: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in content.items()
        }
        return Preprocess(**options)


def resize_edge(image_size: int, crop_pct: float) -> int:
    """Pixels that images are resized to before the crop, rounded as in timm."""
    return math.floor(image_size / crop_pct)


def crop_pct(image_size: int, edge: int) -> float:
    """Largest crop_pct whose `resize_edge` is `edge`."""
    exact = image_size / edge
    return exact if resize_edge(image_size, exact) == edge else math.nextafter(exact, 0)


@dataclass(frozen=True)
class Weights:
    """An encoder (classifier.Classifier) or a complete pretraining model (digpt.DiGPT).

    params: flat, float32. pooling: "cls" or "mean"; None for a pretraining model, which has no
    final norm, and `pos_embed` only if model.positions is "learned". source: origin, for messages.
    run: {"config", "step", "init"} of the training, as far as recorded. notes: lines to print for
    the user. classes: class names of the head in the order of its outputs; empty if unknown.
    """

    model: ModelConfig
    params: dict[str, np.ndarray]
    pooling: str | None
    source: str
    preprocess: Preprocess = Preprocess()
    run: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    @property
    def full(self) -> bool:
        """True for a pretraining model."""
        return self.pooling is None

    @property
    def num_classes(self) -> int:
        return self.params["head/bias"].shape[0] if "head/bias" in self.params else 0

    @property
    def decoders(self) -> tuple[str, ...]:
        """Decoders of a pretraining model. Raises UserError if it has predictions for further
        teachers (config.teachers): no layout of complete models stores them."""
        if names := sorted({m[1] for path in self.params if (m := _FURTHER.match(path))}):
            raise UserError(
                f"{self.source} has predictions for further teachers ({', '.join(names)}): only "
                f"its encoder is read and exported (--part=encoder, load_encoder)"
            )
        return tuple(name for name in DECODERS if f"{name}/pred/kernel" in self.params)

    @property
    def out_width(self) -> int:
        """Width of the decoders' predictions."""
        return self.params[f"{self.decoders[0]}/pred/kernel"].shape[1]

    def module(self) -> nn.Module:
        """Flax module of the parameters."""
        if self.pooling is not None:
            return classifier.classifier(self.model, self.pooling, self.num_classes)
        return digpt.build(self.model, out_width=self.out_width, decoders=self.decoders)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """{path: shape} of the module's parameters."""
        if self.pooling is not None:
            return encoder_shapes(self.model, self.pooling, self.num_classes)
        return full_shapes(self.model, self.out_width, self.decoders)


@dataclass(frozen=True)
class WeightLayout:
    """A storage layout of weights.

    detect(state, path): True if the arrays are in this layout (state None: path is a directory).
    read(state, path, heads, decoder_heads): Weights. table(weights): entries for its parameters.
    save(weights, path): writes a file, or into an existing directory, with the layout's JSON;
    raises UserError before writing if the layout cannot represent the weights. suffixes: of the
    file, the default first; empty for a directory. full: True if it can store decoders.
    """

    name: str
    detect: Callable[[Mapping[str, np.ndarray] | None, Path], bool]
    read: Callable[..., Weights]
    table: Callable[[Weights], list[ArrayEntry]]
    save: Callable[[Weights, Path], None] | None = None
    suffixes: tuple[str, ...] = ()
    full: bool = False


def assumption_note(path: Path | str, names: Iterable[str], assumed: str) -> tuple[str, ...]:
    """Note that the named preprocessing settings are unspecified and `assumed` is used."""
    if not (names := list(names)):
        return ()
    return (f"{path} does not specify {' and '.join(names)}: using {assumed}",)


def encoder_model(
    *, width: int, patch: int, heads: int, depth: int, mlp_width: int, image_size: int, **options
) -> ModelConfig:
    """The `config.Model` of an encoder that was not pretrained here. Raises UserError."""
    ratio = mlp_width / width
    if int(width * ratio) != mlp_width:  # rounded below by floating point
        ratio = (mlp_width + 0.5) / width
    return parse(
        ModelConfig,
        dict(
            width=width, patch=patch, heads=heads, depth=depth, mlp_ratio=ratio,
            image_size=image_size, segments=(1, 1), **options,
        ),
    )  # fmt: skip


def image_side(positions: int, patch: int, path: Path | str) -> int:
    """Side in pixels of a square image from its number of positions, CLS included.
    Raises UserError."""
    side = round(max(positions - 1, 0) ** 0.5)
    if side * side + 1 != positions:
        raise UserError(f"{path}: {positions} positions are not CLS and a square grid")
    return patch * side


def depth_of(state: Mapping[str, np.ndarray], prefix: str, path: Path | str) -> int:
    """Number of blocks: one more than the largest index after the prefix. Raises UserError."""
    numbers = [int(n.removeprefix(prefix).split(".")[0]) for n in state if n.startswith(prefix)]
    if not numbers:
        raise UserError(f"{path} has no blocks ({prefix}0.…)")
    return 1 + max(numbers)


def require_arrays(
    state: Mapping[str, np.ndarray], names: Iterable[str], path: Path | str
) -> list[np.ndarray]:
    """The named arrays. Raises UserError if one is missing."""
    names = list(names)
    if missing := [name for name in names if name not in state]:
        raise UserError(f"{path}: missing {', '.join(missing)}")
    return [state[name] for name in names]


@lru_cache
def encoder_shapes(
    model: ModelConfig, pooling: str, num_classes: int
) -> Mapping[str, tuple[int, ...]]:
    """{path: shape} of classifier.Classifier's parameters."""
    module = classifier.classifier(model, pooling, num_classes)
    return _shapes(module, digpt.dummy_inputs(model)[:1])


@lru_cache
def full_shapes(
    model: ModelConfig, out_width: int, decoders: tuple[str, ...] = ("next", "visible")
) -> Mapping[str, tuple[int, ...]]:
    """{path: shape} of digpt.DiGPT's parameters."""
    module = digpt.build(model, out_width=out_width, decoders=decoders)
    return _shapes(module, digpt.dummy_inputs(model))


def _shapes(module: nn.Module, inputs) -> Mapping[str, tuple[int, ...]]:
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    return MappingProxyType({p: leaf.shape for p, leaf in mapping.flatten(params).items()})


def encoder(weights: Weights, pooling: str | None) -> Weights:
    """Encoder of a pretraining model with the given pooling; an encoder unchanged.

    Raises UserError if an encoder has another pooling, since its last norm is applied elsewhere.
    """
    if weights.full:
        params = {
            p: x for p, x in weights.params.items() if p.startswith(("encoder/", "pos_embed"))
        }
        params = mapping.flatten(
            classifier.classifier_params_from_pretraining(mapping.unflatten(params), weights.model)
        )
        return dataclasses.replace(weights, params=params, pooling=pooling or "cls")
    if pooling not in (None, weights.pooling):
        raise UserError(f"{weights.source} has pooling {weights.pooling}, not {pooling}")
    return weights


def adapt(
    weights: Weights,
    *,
    image_size: int | None = None,
    eps: float | None = None,
    activation: str | None = None,
) -> Weights:
    """Weights with another image size, eps or GELU; each change adds a note.

    Positions are resized as in timm. Raises UserError.
    """
    old = weights.model
    changes = {"image_size": image_size, "eps": eps, "activation": activation}
    changes = {n: v for n, v in changes.items() if v is not None and v != getattr(old, n)}
    if not changes:
        return weights
    model = dataclasses.replace(old, **changes).resolved()
    params, notes = dict(weights.params), []
    if "pos_embed" in params and model.grid != old.grid:
        grid = (model.grid, model.grid)
        params["pos_embed"] = bicubic_antialiased(params["pos_embed"][0], grid, True)[None]
    for name, value in changes.items():
        notes.append(f"{name} changed from {getattr(old, name)} to {value}: outputs differ")
    return dataclasses.replace(weights, model=model, params=params, notes=(*weights.notes, *notes))
