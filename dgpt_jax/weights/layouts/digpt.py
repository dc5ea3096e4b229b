"""The official D-iGPT's state dict (`models_digpt.py`): `ar` is our `next`, `kd` our `visible`.

With one exception: `forward_encoder` returns the `kd` features first and `forward` uses them as the
`ar` ones, so `kd_enc_norm` and `kd_enc2dec` feed the `ar` decoder, and `ar_enc_*` the `kd` one. The
table assigns them to the decoder that uses them.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dgpt_jax.config import ModelConfig
from dgpt_jax.config.model import SIZES
from dgpt_jax.config.schema import parse
from dgpt_jax.data import segments
from dgpt_jax.data.normalization import IMAGENET_MEAN, IMAGENET_STD
from dgpt_jax.errors import MissingHeads, UserError
from dgpt_jax.weights import files, mapping
from dgpt_jax.weights.mapping import ArrayEntry, linear, norm
from dgpt_jax.weights.types import (
    WeightLayout,
    Weights,
    assumption_note,
    depth_of,
    full_shapes,
    image_side,
    require_arrays,
)

# {our decoder: (official prefix of its blocks, of its encoder features)}
DECODERS = {"next": ("ar", "kd"), "visible": ("kd", "ar")}
WHAT = "official D-iGPT weights"
# Constants, rebuilt from the geometry and compared when read; pos_embed unless it is learned.
FIXED = ("mask", "pos_embed", "decoder_pos_embed")


def entries(model: ModelConfig) -> list[ArrayEntry]:
    """Table for a resolved `config.Model`."""
    table = [ArrayEntry("cls_token", "encoder/cls_token")]
    if model.positions == "learned":
        table.append(ArrayEntry("pos_embed", "pos_embed"))
    table += mapping.patch_embed("patch_embed.proj", "encoder/patch_embed")
    table += mapping.timm_blocks("blocks", "encoder/blocks", model.depth)
    for native, (prefix, source) in DECODERS.items():
        table.append(ArrayEntry(f"{prefix}_token", f"{native}/token"))
        copies = [f"{source}_enc_norm.{i}" for i in range(1, len(model.taps))]
        table += norm(f"{source}_enc_norm.0", f"{native}/enc_norm", copies)
        table += linear(f"{source}_enc2dec", f"{native}/enc2dec")
        for i in range(model.decoder_depth):
            block, path = f"{prefix}_blocks.{i}", f"{native}/blocks"
            for name in ("norm1", "norm2_1", "norm2_2", "norm2"):
                table += norm(f"{block}.{name}", f"{path}/{name}", layer=i)
            for name in (
                "attn1.qkv", "attn1.proj", "attn2.q", "attn2.kv", "attn2.proj", "mlp.fc1", "mlp.fc2"
            ):  # fmt: skip
                table += linear(f"{block}.{name}", f"{path}/{name.replace('.', '/')}", layer=i)
        table += norm(f"{prefix}_norm", f"{native}/norm")
        table += linear(f"{prefix}_pred", f"{native}/pred")
    return table


def model_of(
    state: Mapping[str, np.ndarray], heads: int | None = None, decoder_heads: int | None = None
) -> ModelConfig:
    """The `config.Model` of an official state dict.

    A state dict does not store head counts: they default to the official base model's (12 and 32)
    for its widths (768 and 1024). Raises UserError if they are not set for other widths.
    """
    names = ("patch_embed.proj.weight", "ar_token", "pos_embed", "blocks.0.mlp.fc1.weight")
    kernel, token, positions, hidden = require_arrays(state, names, WHAT)
    width, _, patch, _ = kernel.shape
    decoder_width = token.shape[-1]
    if heads is None and width == SIZES["B/16"][0]:
        heads = SIZES["B/16"][2]
    if decoder_heads is None and decoder_width == ModelConfig.decoder_width:
        decoder_heads = ModelConfig.decoder_heads
    if heads is None or decoder_heads is None:
        raise MissingHeads(
            f"a state dict does not store head counts: set --heads and --decoder_heads for widths "
            f"{width} and {decoder_width}"
        )
    return parse(
        ModelConfig,
        dict(
            width=width,
            patch=patch,
            heads=heads,
            depth=depth_of(state, "blocks.", WHAT),
            image_size=image_side(positions.shape[1], patch, WHAT),
            mlp_ratio=len(hidden) / width,
            decoder_width=decoder_width,
            decoder_depth=depth_of(state, "ar_blocks.", WHAT),
            decoder_heads=decoder_heads,
            positions=_kind_of_positions(positions),
        ),
    )


def _kind_of_positions(positions: np.ndarray) -> str:
    """Value of config.model.positions for positions (1, 1+N, D) of a square grid: the official code
    has sin-cos ones, but computes with those of the state dict."""
    _, count, width = positions.shape
    table = segments.sincos_table(width, round((count - 1) ** 0.5))
    return "sincos" if np.allclose(positions, table, rtol=0, atol=1e-5) else "learned"


def fixed_arrays(model: ModelConfig) -> dict[str, np.ndarray]:
    """Arrays of FIXED for a model with 2×2 segments."""
    tokens = model.grid**2 // segments.count(model.segments)
    mask = segments.attention_mask(segments.visible_count(model.segments), tokens, model.cls_mask)
    arrays = {
        "mask": np.where(mask, np.float32(0), np.float32(-np.inf)),
        "decoder_pos_embed": segments.sincos_table(model.decoder_width, model.grid),
    }
    if model.positions == "sincos":
        arrays["pos_embed"] = segments.sincos_table(model.width, model.grid)
    return arrays


def read(
    state: Mapping[str, np.ndarray], model: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """Flat parameters of the pretraining model from an official state dict. Raises UserError."""
    for name, expected in fixed_arrays(model).items():
        actual = state.get(name, np.zeros(0))
        if actual.shape != expected.shape or not np.allclose(actual, expected, atol=1e-5):
            raise UserError(f"{WHAT}: {name} differs from the constant for {model}")
    return mapping.read(entries(model), state, shapes, ignore=FIXED, what=WHAT)


def write(params: Mapping[str, np.ndarray], model: ModelConfig) -> dict[str, np.ndarray]:
    """Official state dict of flat parameters of the pretraining model."""
    return mapping.write(entries(model), params) | fixed_arrays(model)


def _read(
    state: Mapping[str, np.ndarray],
    path: Path,
    heads: int | None = None,
    decoder_heads: int | None = None,
) -> Weights:
    model = model_of(state, heads, decoder_heads)
    (pred,) = require_arrays(state, ["ar_pred.weight"], path)
    params = read(state, model, full_shapes(model, len(pred)))
    notes = assumption_note(path, ("mean", "std"), "ImageNet's, as in pretraining here")
    return Weights(model, params, None, str(path), notes=notes)


def _save(weights: Weights, path: Path) -> None:
    """Writes {"model": state dict} as .pth, or the state dict as .safetensors."""
    model = weights.model
    required = {n: getattr(ModelConfig, n) for n in ("segments", "cls_mask", "eps", "activation")}
    required["taps"] = dataclasses.replace(model, taps=None).resolved().taps
    for name, official in required.items():
        if getattr(model, name) != official:
            raise UserError(
                f"the official code has {name} {official}, {weights.source} has "
                f"{getattr(model, name)}: use --to=flax or safetensors"
            )
    for name, official in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
        if (actual := getattr(weights.preprocess, name)) != official:
            raise UserError(
                f"the official code normalizes images with {name} {official}, {weights.source} was "
                f"trained with {actual}: use --to=flax or safetensors"
            )
    missing = [name for name in DECODERS if f"{name}/token" not in weights.params]
    if missing:
        raise UserError(
            f"the official layout has both decoders, {weights.source} lacks {missing[0]}"
        )
    state = write(weights.params, model)
    if path.suffix == ".safetensors":
        files.write_safetensors(path, state, {"format": "pt"})
    else:
        files.write_torch(path, {"model": state})


LAYOUT = WeightLayout(
    "digpt",
    detect=lambda state, path: state is not None and "ar_token" in state,
    read=_read,
    table=lambda weights: entries(weights.model),
    save=_save,
    suffixes=(".pth", ".safetensors"),
    full=True,
)
