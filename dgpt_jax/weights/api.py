"""Python API: pretrained encoders, classifiers and D-iGPT models by path."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import jax
from jax.typing import ArrayLike

from dgpt_jax.config import ModelConfig
from dgpt_jax.data import segments
from dgpt_jax.errors import UserError
from dgpt_jax.models import classifier, digpt, vit
from dgpt_jax.storage import gcs
from dgpt_jax.weights import input_checks, mapping, registry
from dgpt_jax.weights.chunking import in_chunks, on_device
from dgpt_jax.weights.types import Preprocess, Weights
from dgpt_jax.weights.types import encoder as encoder_of


@dataclass(frozen=True)
class PretrainedEncoder:
    """An encoder with full attention, CLS first, and a final norm (classifier.Classifier, no head).

    model: config.Model. source: origin of the params. run: {"config", "step"} of the training, if
    recorded. notes: lines to print for the user.

    Methods are compiled once for all encoders of a shape, process images in chunks, and can be
    traced by jit and grad, with dataclasses.replace(encoder, params=traced). Params move to the
    device at the first call; later in-place changes have no effect, `replace` does. Images are
    RGB (B, size, size, 3), uint8 or float from 0 to 255. Raises UserError on others; traced images
    are checked by shape and dtype.
    """

    model: ModelConfig
    params: Any = field(repr=False)
    source: str
    preprocess: Preprocess = field(default_factory=Preprocess)
    run: Mapping[str, Any] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = field(default=(), repr=False)

    def features(self, images: ArrayLike, pooling: str = "cls") -> jax.Array:
        """Features (B, D) float32 of images (B, size, size, 3)."""
        input_checks.check_poolings([pooling])
        return self._apply(images, "features", pooling)

    def tokens(self, images: ArrayLike) -> jax.Array:
        """Normed tokens (B, 1+N, D) float32, CLS first."""
        return self._apply(images, "tokens", "cls")

    def pooled(self, images: ArrayLike, poolings: Sequence[str]) -> dict[str, jax.Array]:
        """{pooling: features (B, D) float32} of several poolings in one pass."""
        return self._apply(images, "pooled", "cls", input_checks.check_poolings(poolings))

    @cached_property
    def device_params(self) -> Any:
        """`params` on the default device."""
        return on_device(self.params)

    def _apply(self, images, method: str, pooling: str, *args, classes: int = 0) -> Any:
        module = classifier.classifier(self.model, pooling, classes)
        run = partial(_apply, module=module, preprocess=self.preprocess, method=method, args=args)
        images = input_checks.check_raw_images(images, self.model.image_size)
        return in_chunks(run, self.device_params, images)


@dataclass(frozen=True)
class PretrainedClassifier(PretrainedEncoder):
    """An encoder with its classification head. classes: class names in the order of the logits;
    empty if unknown."""

    pooling: str = "mean"
    num_classes: int = 0
    classes: tuple[str, ...] = field(default=(), repr=False)

    def logits(self, images: ArrayLike) -> jax.Array:
        """Logits (B, classes) float32 of images (B, size, size, 3)."""
        return self._apply(images, "__call__", self.pooling, classes=self.num_classes)


@dataclass(frozen=True)
class PretrainedDiGPT:
    """A complete pretraining model: encoder and decoders."""

    model: ModelConfig
    params: Any = field(repr=False)
    module: digpt.DiGPT = field(repr=False)
    preprocess: Preprocess = field(default_factory=Preprocess)

    @cached_property
    def device_params(self) -> Any:
        """`params` on the default device."""
        return on_device(self.params)

    def predictions(self, images: ArrayLike, orders: ArrayLike) -> dict[str, jax.Array]:
        """{decoder: (B, V·T+1, C)} as DiGPT returns them.

        images: normalized (B, size, size, 3); orders: int (B, S). Raises UserError (input_checks).
        """
        images, orders = self._checked(images, orders)
        return in_chunks(partial(_predict, module=self.module), self.device_params, images, orders)

    def losses(
        self, images: ArrayLike, tokens: ArrayLike, orders: ArrayLike, params: Any = None, *,
        cls: bool = True,
    ) -> dict[str, jax.Array]:  # fmt: skip
        """{"next", "visible"}: mean 2-2cos to teacher tokens (B, cls+N, C), CLS first.

        images: normalized (B, size, size, 3); orders: int (B, S); params: replace the loaded ones;
        cls: True if the teacher has a CLS token. Jittable, and differentiable in images, tokens and
        params. Raises UserError (input_checks).
        """
        images, orders = self._checked(images, orders)
        tokens = input_checks.check_tokens(tokens, self.module.out_width, cls=cls)
        params = self.device_params if params is None else on_device(params)
        run = partial(_losses, module=self.module, model=self.model, cls=cls)
        losses_B = in_chunks(run, params, images, tokens, orders)
        return {name: values.mean() for name, values in losses_B.items()}

    def _checked(self, images, orders):
        images = input_checks.check_normalized_images(images, self.model.image_size)
        return images, input_checks.check_orders(orders, segments.count(self.model.segments))


# Inlined, so that a caller's jit compiles them with its own code.
@partial(jax.jit, static_argnames=("module", "preprocess", "method", "args"), inline=True)
def _apply(params, images, *, module, preprocess, method, args):
    images = vit.normalize(images, preprocess.mean, preprocess.std)
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


def load_encoder(path: gcs.AnyPath, *, heads: int | None = None) -> PretrainedEncoder:
    """Loads the encoder of a work directory (its newest checkpoint), or weights in a known layout.

    heads: for weights without JSON that specifies them. A classification head is dropped. Raises
    UserError.
    """
    _, weights = registry.read(path, heads=heads, encoder_only=True)
    weights = encoder_of(weights, None)
    params = {p: x for p, x in weights.params.items() if not p.startswith("head/")}
    return PretrainedEncoder(params=mapping.unflatten(params), **_metadata(weights))


def _metadata(weights: Weights) -> dict[str, Any]:
    names = ("model", "source", "preprocess", "run", "notes")
    return {name: getattr(weights, name) for name in names}


def load_classifier(path: gcs.AnyPath, *, heads: int | None = None) -> PretrainedClassifier:
    """Loads fine-tuned weights with their head: a work directory, or a layout that stores heads.

    Raises UserError, also if there is no head.
    """
    _, weights = registry.read(path, heads=heads, encoder_only=True)
    if not weights.num_classes:
        raise UserError(
            f"{path} has no classification head: use fine-tuned weights, or evaluate frozen "
            f"features (--config=knn_in1k, fewshot_in1k or linear_in1k)"
        )
    assert weights.pooling is not None  # only encoders have heads
    return PretrainedClassifier(
        params=mapping.unflatten(weights.params),
        **_metadata(weights),
        pooling=weights.pooling,
        num_classes=weights.num_classes,
        classes=weights.classes,
    )


def untrained(model: ModelConfig, seed: int) -> PretrainedEncoder:
    """Randomly initialized encoder, as pretraining starts it: a baseline for pretrained ones."""
    params = _init(
        jax.random.key(seed), *digpt.dummy_inputs(model), module=digpt.build(model, out_width=1)
    )
    return PretrainedEncoder(
        model,
        classifier.classifier_params_from_pretraining(params, model),
        f"untrained, seed {seed}",
    )


def load_digpt(
    path: gcs.AnyPath, *, heads: int | None = None, decoder_heads: int | None = None
) -> PretrainedDiGPT:
    """Loads the pretraining model of a work directory, or of the official layout.

    heads, decoder_heads: for official files (.pth, .safetensors) of other widths than the base
    model's, since they do not store head counts. Raises UserError.
    """
    _, weights = registry.read(path, heads=heads, decoder_heads=decoder_heads)
    if not weights.full:
        raise UserError(f"{path} is an encoder without decoders")
    module = weights.module()
    assert isinstance(module, digpt.DiGPT)
    params = mapping.unflatten(weights.params)
    return PretrainedDiGPT(weights.model, params, module, weights.preprocess)
