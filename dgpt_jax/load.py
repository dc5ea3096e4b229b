"""Weights by path, ready to use: what notebooks, `evaluate` and `convert` open."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgpt_jax import checkpoint, digpt, heads, vit
from dgpt_jax.config import Model
from dgpt_jax.convert import digpt as official
from dgpt_jax.convert import files, layout, timm
from dgpt_jax.schema import UserError, parse


@dataclass(frozen=True)
class Encoder:
    """An encoder for use: full attention, CLS first, final norm (heads.Classifier without head).

    Attributes: model (config.Model), params, and where they came from.
    """

    model: Model
    params: Any
    source: str

    def features(self, pictures, pooling: str = "cls"):
        """uint8 RGB (B, size, size, 3) to features (B, D) float32; jittable."""
        module = heads.classifier(self.model, pooling)
        images = vit.normalise(jnp.asarray(pictures))
        return module.apply({"params": self.params}, images)

    def tokens(self, pictures):
        """uint8 RGB (B, size, size, 3) to normed tokens (B, 1+N, D) float32, CLS first."""
        module = heads.classifier(self.model, "cls")
        images = vit.normalise(jnp.asarray(pictures))
        return module.apply({"params": self.params}, images, method="tokens")


@dataclass(frozen=True)
class Pretrained:
    """The whole pretraining model: encoder and decoders."""

    model: Model
    params: Any
    module: digpt.DiGPT

    def predictions(self, images, orders):
        """{decoder: (B, V·T+1, C)} for normalised images and orders, as DiGPT returns them."""
        return self.module.apply({"params": self.params}, images, orders)

    def losses(self, images, tokens, orders, params=None, *, cls=True) -> dict[str, jax.Array]:
        """{"next", "visible"}: mean 2-2cos to teacher tokens (B, cls+N, C), CLS first.

        images: normalised (B, size, size, 3); orders: int (B, S). Jittable, and differentiable in
        every argument; `params` replaces the loaded ones; `cls`: whether the teacher has a CLS.
        """
        params = self.params if params is None else params
        predictions = self.module.apply({"params": params}, images, orders)
        grid = (self.model.grid, self.model.grid)
        parts = digpt.token_losses(
            predictions, tokens, orders, grid=grid, segment_grid=self.model.segments, cls=cls
        )
        return {name: values.mean() for name, values in parts.items()}


def load_encoder(path) -> Encoder:
    """The encoder of a work directory (its newest checkpoint), or of safetensors in timm's layout.

    Safetensors need their config.json beside them (tools/convert.py writes both). Raises UserError.
    """
    path = Path(path)
    if path.is_dir() and (path / "checkpoints").is_dir():
        params, metadata = checkpoint.load_params(path)
        model = parse(Model, metadata["config"]["model"])
        params = heads.from_pretrained(params["encoder"], model)
        return Encoder(model, params, f"{path}, step {metadata['step']}")
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{path} is neither a work directory with checkpoints nor a weights file")
    state = files.read_state(file)
    config_file = file.parent / "config.json"
    config = json.loads(config_file.read_text()) if config_file.is_file() else {}
    model = timm.model_of(state, config)
    pooling = timm.pooling_of(state)
    for name in ("head.weight", "head.bias"):  # an encoder is asked for
        state.pop(name, None)
    module = heads.classifier(model, pooling)
    params = timm.read(state, model.depth, pooling, _shapes(module, model, images_only=True))
    return Encoder(model, layout.unflatten(params), str(file))


def untrained(model: Model, seed: int) -> Encoder:
    """The encoder as pretraining starts it: the baseline that a pretrained one is compared with."""
    init = jax.jit(digpt.build(model, out_width=1).init)
    params = init(jax.random.key(seed), *digpt.dummy_inputs(model))["params"]
    return Encoder(
        model, heads.from_pretrained(params["encoder"], model), f"untrained, seed {seed}"
    )


def load_digpt(path, *, heads: int | None = None, decoder_heads: int | None = None) -> Pretrained:
    """The pretraining model of a work directory, or of the official layout (.pth, .safetensors).

    Head counts are not in official files: widths other than the base model's need them given.
    """
    path = Path(path)
    if path.is_dir():
        params, metadata = checkpoint.load_params(path)
        model = parse(Model, metadata["config"]["model"])
        decoders = tuple(name for name in ("next", "visible") if name in params)
        out_width = params[decoders[0]]["pred"]["kernel"].shape[1]
        module = digpt.build(model, out_width=out_width, decoders=decoders)
        return Pretrained(model, params, module)
    if not path.is_file():
        raise UserError(f"no such file or directory: {path}")
    state = files.read_state(path)
    if "ar_token" not in state:
        raise UserError(f"{path} does not hold official D-iGPT weights: it has no ar_token")
    model = official.model_of(state, heads, decoder_heads)
    module = digpt.build(model, out_width=state["ar_pred.weight"].shape[0])
    params = official.read(state, model, _shapes(module, model))
    return Pretrained(model, layout.unflatten(params), module)


def _shapes(module, model: Model, images_only: bool = False) -> dict[str, tuple[int, ...]]:
    inputs = digpt.dummy_inputs(model)
    inputs = inputs[:1] if images_only else inputs
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    return {path: leaf.shape for path, leaf in layout.flatten(params).items()}


def to_flat(params) -> dict[str, np.ndarray]:
    """Nested parameters as {"encoder/cls_token": array}."""
    return {path: np.asarray(leaf) for path, leaf in layout.flatten(params).items()}
