"""Weights by path, ready to use: what notebooks, `evaluate` and `convert` open."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgpt_jax import arguments, digpt, heads, segments, vit
from dgpt_jax.config import Model
from dgpt_jax.convert import formats, layout
from dgpt_jax.convert.weights import Preprocess
from dgpt_jax.convert.weights import encoder as encoder_of
from dgpt_jax.schema import UserError

# Images that an encoder computes at a time. At 224 pixels features of so many take 0.4 GB (B/16) to
# 0.9 GB (H/14) beside the weights, the losses of pretraining 0.9 to 2.9 GB.
CHUNK = 64


@dataclass(frozen=True)
class Encoder:
    """An encoder for use: full attention, CLS first, final norm (heads.Classifier without head).

    Attributes: model (config.Model), params, where they came from, how pictures are prepared,
    {"config", "step"} of the training, where it is known, and what to tell the user of them.
    Its functions are compiled once for all encoders of a shape, compute CHUNK images at a time, and
    can be traced: by jit, by grad, with dataclasses.replace(encoder, params=traced). The params go
    to the device at the first call; changing their arrays in place after it has no effect,
    `replace` has. Pictures are uint8 RGB (B, size, size, 3), or float from 0 to 255; others raise
    UserError, traced ones by shape and dtype.
    """

    model: Model
    params: Any
    source: str
    preprocess: Preprocess = field(default_factory=Preprocess)
    run: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def features(self, pictures, pooling: str = "cls"):
        """uint8 RGB (B, size, size, 3) to features (B, D) float32."""
        arguments.check_poolings([pooling])
        return self._apply(pictures, "features", pooling)

    def tokens(self, pictures):
        """uint8 RGB (B, size, size, 3) to normed tokens (B, 1+N, D) float32, CLS first."""
        return self._apply(pictures, "tokens", "cls")

    def pooled(self, pictures, poolings: Sequence[str]) -> dict[str, jax.Array]:
        """{pooling: features (B, D) float32} of several poolings in one pass."""
        return self._apply(pictures, "pooled", "cls", arguments.check_poolings(poolings))

    @cached_property
    def device_params(self):
        """`params` on the default device."""
        return _on_device(self.params)

    def _apply(self, pictures, method: str, pooling: str, *args, classes: int = 0):
        module = heads.classifier(self.model, pooling, classes)
        run = partial(_apply, module=module, preprocess=self.preprocess, method=method, args=args)
        pictures = arguments.check_pictures(pictures, self.model.image_size)
        return in_chunks(run, self.device_params, pictures)


@dataclass(frozen=True)
class Classifier(Encoder):
    """An encoder with its classification head: fine-tuned weights. classes: their names, in the
    order of the logits; empty where they are not known."""

    pooling: str = "mean"
    num_classes: int = 0
    classes: tuple[str, ...] = ()

    def logits(self, pictures):
        """uint8 RGB (B, size, size, 3) to logits (B, classes) float32."""
        return self._apply(pictures, "__call__", self.pooling, classes=self.num_classes)


@dataclass(frozen=True)
class Pretrained:
    """The whole pretraining model: encoder and decoders."""

    model: Model
    params: Any
    module: digpt.DiGPT

    @cached_property
    def device_params(self):
        """`params` on the default device."""
        return _on_device(self.params)

    def predictions(self, images, orders):
        """{decoder: (B, V·T+1, C)} for normalised images and orders, as DiGPT returns them.

        Raises UserError on other arrays (arguments.py).
        """
        images, orders = self._checked(images, orders)
        return in_chunks(partial(_predict, module=self.module), self.device_params, images, orders)

    def losses(self, images, tokens, orders, params=None, *, cls=True) -> dict[str, jax.Array]:
        """{"next", "visible"}: mean 2-2cos to teacher tokens (B, cls+N, C), CLS first.

        images: normalised (B, size, size, 3); orders: int (B, S). Jittable, and differentiable in
        every argument; `params` replaces the loaded ones; `cls`: whether the teacher has a CLS.
        Raises UserError on other arrays (arguments.py).
        """
        images, orders = self._checked(images, orders)
        tokens = arguments.check_tokens(tokens, self.module.out_width, cls=cls)
        params = self.device_params if params is None else _on_device(params)
        run = partial(_losses, module=self.module, model=self.model, cls=cls)
        parts = in_chunks(run, params, images, tokens, orders)
        return {name: values.mean() for name, values in parts.items()}

    def _checked(self, images, orders):
        images = arguments.check_images(images, self.model.image_size)
        return images, arguments.check_orders(orders, segments.count(self.model.segments))


# Inlined: within a caller's jit they compile to what they would if written there.
@partial(jax.jit, static_argnames=("module", "preprocess", "method", "args"), inline=True)
def _apply(params, pictures, *, module, preprocess, method, args):
    images = vit.normalise(pictures, preprocess.mean, preprocess.std)
    return module.apply({"params": params}, images, *args, method=method)


@partial(jax.jit, static_argnames="module", inline=True)
def _predict(params, images, orders, *, module):
    return module.apply({"params": params}, images, orders)


@partial(jax.jit, static_argnames=("module", "model", "cls"), inline=True)
def _losses(params, images, tokens, orders, *, module, model, cls):
    """{decoder: (B,)}."""
    return digpt.token_losses(
        _predict(params, images, orders, module=module), tokens, orders,
        grid=(model.grid, model.grid), segment_grid=model.segments, cls=cls,
    )  # fmt: skip


@partial(jax.jit, static_argnames="module")
def _init(key, images, order, *, module):
    return module.init(key, images, order)["params"]


def in_chunks(run: Callable, params, *arrays):
    """run(params, *arrays), computed on at most CHUNK rows of the arrays at a time.

    Row i of its results, a tree of jax.Array (B, …), must depend on row i of the arrays (B, …)
    alone. Batches are padded to a power of two, so that seven programs serve all batch sizes.
    Traced arguments, and arrays that are split over devices, are computed in one call. Raises
    UserError where the arrays are empty or differ in length.
    """
    if any(map(_is_traced, jax.tree.leaves((params, arrays)))) or any(map(_is_split, arrays)):
        return run(params, *arrays)
    arrays = [np.asarray(x) for x in arrays]
    lengths = [len(x) for x in arrays]
    count = lengths[0]
    if not count or set(lengths) != {count}:
        raise UserError(f"a batch of {lengths} rows: give as many of each, and at least one")
    size = min(CHUNK, 1 << (count - 1).bit_length())
    with jax.ensure_compile_time_eval():  # arrays may be constants in a caller's jit
        if count == size:
            return run(params, *arrays)
        rows = None
        for start in range(0, count, size):
            chunk = run(params, *(_pad(x[start : start + size], size) for x in arrays))
            if rows is None:
                rows = jax.tree.map(lambda x: np.empty((count, *x.shape[1:]), x.dtype), chunk)
            for buffer, result in zip(*map(jax.tree.leaves, (rows, chunk)), strict=True):
                buffer[start : start + size] = np.asarray(result)[: count - start]
        return jax.tree.map(jnp.asarray, rows)


def _pad(rows: np.ndarray, size: int) -> np.ndarray:
    """`size` rows: the given ones, then copies of the last."""
    return np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)])


def _on_device(params):
    """The params on the default device; traced ones as they are."""
    if any(map(_is_traced, jax.tree.leaves(params))):
        return params
    with jax.ensure_compile_time_eval():
        return jax.device_put(params)


def _is_traced(x) -> bool:
    return isinstance(x, jax.core.Tracer)


def _is_split(x) -> bool:
    return isinstance(x, jax.Array) and len(x.sharding.device_set) > 1


def load_encoder(path, *, heads: int | None = None) -> Encoder:
    """The encoder of a work directory (its newest checkpoint), or of weights in a known layout.

    `heads` is for weights beside which no JSON tells it. A classification head is left out. Raises
    UserError.
    """
    _, weights = formats.read(path, heads=heads, encoder_only=True)
    weights = encoder_of(weights, None)
    params = {p: x for p, x in weights.params.items() if not p.startswith("head/")}
    return Encoder(params=layout.unflatten(params), **_about(weights))


def _about(weights) -> dict[str, Any]:
    """What an Encoder tells of convert.weights.Weights, beside the parameters."""
    names = ("model", "source", "preprocess", "run", "notes")
    return {name: getattr(weights, name) for name in names}


def load_classifier(path, *, heads: int | None = None) -> Classifier:
    """Fine-tuned weights with their head: a work directory, or any layout that holds heads.

    Raises UserError, also where there is no head.
    """
    _, weights = formats.read(path, heads=heads, encoder_only=True)
    if not weights.num_classes:
        raise UserError(
            f"{path} has no classification head: give fine-tuned weights, or measure frozen "
            f"features (configs/knn_in1k.py, fewshot_in1k.py, linear_in1k.py)"
        )
    return Classifier(
        params=layout.unflatten(weights.params),
        **_about(weights),
        pooling=weights.pooling,
        num_classes=weights.num_classes,
        classes=weights.classes,
    )


def untrained(model: Model, seed: int) -> Encoder:
    """The encoder as pretraining starts it: the baseline that a pretrained one is compared with."""
    params = _init(
        jax.random.key(seed), *digpt.dummy_inputs(model), module=digpt.build(model, out_width=1)
    )
    return Encoder(
        model, heads.from_pretrained(params["encoder"], model), f"untrained, seed {seed}"
    )


def load_digpt(path, *, heads: int | None = None, decoder_heads: int | None = None) -> Pretrained:
    """The pretraining model of a work directory, or of the official layout (.pth, .safetensors).

    Head counts are not in official files: widths other than the base model's need them given.
    """
    _, weights = formats.read(path, heads=heads, decoder_heads=decoder_heads)
    if not weights.full:
        raise UserError(f"{path} holds an encoder without decoders")
    return Pretrained(weights.model, layout.unflatten(weights.params), weights.module())
