"""The official D-iGPT's state dict (`models_digpt.py`): `ar` is our `next`, `kd` our `visible`.

Except on the way from the encoder: `forward_encoder` returns the `kd` features first and `forward`
takes them as the `ar` ones, so `kd_enc_norm` and `kd_enc2dec` feed the `ar` decoder, and `ar_enc_*`
the `kd` one. The table below undoes that, so that a decoder here holds what it really uses.
"""

import dataclasses
from pathlib import Path

import numpy as np

from dgpt_jax import segments
from dgpt_jax.convert import files, layout
from dgpt_jax.convert.layout import Entry, linear, norm
from dgpt_jax.convert.weights import (
    Layout,
    Weights,
    assumed,
    depth_of,
    full_shapes,
    image_side,
    needed,
)
from dgpt_jax.schema import UserError, parse
from dgpt_jax.sections import SIZES, Model

# Our decoder: the official prefix of its blocks, and that of its encoder features.
DECODERS = {"next": ("ar", "kd"), "visible": ("kd", "ar")}
WHAT = "official D-iGPT weights"
# Fixed, not trained: rebuilt from geometry, and compared when read.
FIXED = ("mask", "pos_embed", "decoder_pos_embed")


def entries(model: Model) -> list[Entry]:
    """The table for a resolved `config.Model`."""
    table = [Entry("cls_token", "encoder/cls_token")]
    table += layout.patch_embed("patch_embed.proj", "encoder/patch_embed")
    table += layout.timm_blocks("blocks", "encoder/blocks", model.depth)
    for ours, (theirs, source) in DECODERS.items():
        table.append(Entry(f"{theirs}_token", f"{ours}/token"))
        copies = [f"{source}_enc_norm.{i}" for i in range(1, len(model.taps))]
        table += norm(f"{source}_enc_norm.0", f"{ours}/enc_norm", copies)
        table += linear(f"{source}_enc2dec", f"{ours}/enc2dec")
        for i in range(model.decoder_depth):
            block, path = f"{theirs}_blocks.{i}", f"{ours}/blocks"
            for name in ("norm1", "norm2_1", "norm2_2", "norm2"):
                table += norm(f"{block}.{name}", f"{path}/{name}", layer=i)
            for name in (
                "attn1.qkv", "attn1.proj", "attn2.q", "attn2.kv", "attn2.proj", "mlp.fc1", "mlp.fc2"
            ):  # fmt: skip
                table += linear(f"{block}.{name}", f"{path}/{name.replace('.', '/')}", layer=i)
        table += norm(f"{theirs}_norm", f"{ours}/norm")
        table += linear(f"{theirs}_pred", f"{ours}/pred")
    return table


def model_of(state, heads: int | None = None, decoder_heads: int | None = None) -> Model:
    """The `config.Model` of an official state dict.

    Head counts are not in a state dict: the official base model's (12 and 32) are taken for its
    widths (768 and 1024), any other width needs them given.
    """
    names = ("patch_embed.proj.weight", "ar_token", "pos_embed", "blocks.0.mlp.fc1.weight")
    kernel, token, positions, hidden = needed(state, names, WHAT)
    width, _, patch, _ = kernel.shape
    decoder_width = token.shape[-1]
    if heads is None and width == SIZES["B/16"][0]:
        heads = SIZES["B/16"][2]
    if decoder_heads is None and decoder_width == Model.decoder_width:
        decoder_heads = Model.decoder_heads
    if heads is None or decoder_heads is None:
        raise UserError(
            f"a state dict does not tell its head counts: give heads and decoder_heads for widths "
            f"{width} and {decoder_width}"
        )
    return parse(
        Model,
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
        ),
    )


def fixed_arrays(model: Model) -> dict[str, np.ndarray]:
    """The arrays of FIXED for a model with 2×2 segments."""
    tokens = model.grid**2 // segments.count(model.segments)
    mask = segments.attention_mask(segments.visible_count(model.segments), tokens, model.cls_mask)

    def positions(width):
        table = segments.sincos_positions(width, model.grid, model.grid).reshape(1, -1, width)
        return np.concatenate([np.zeros((1, 1, width), np.float32), table], axis=1)

    return {
        "mask": np.where(mask, np.float32(0), np.float32(-np.inf)),
        "pos_embed": positions(model.width),
        "decoder_pos_embed": positions(model.decoder_width),
    }


def read(state, model: Model, shapes) -> dict[str, np.ndarray]:
    """Flat parameters of the pretraining model from an official state dict."""
    for name, expected in fixed_arrays(model).items():
        found = state.get(name, np.zeros(0))
        if found.shape != expected.shape or not np.allclose(found, expected, atol=1e-5):
            raise UserError(f"{WHAT}: {name} is not the fixed one of {model}")
    return layout.read(entries(model), state, shapes, ignore=FIXED, what=WHAT)


def write(params, model: Model) -> dict[str, np.ndarray]:
    """An official state dict from flat parameters of the pretraining model."""
    return layout.write(entries(model), params) | fixed_arrays(model)


def _read(state, path: Path, heads=None, decoder_heads=None) -> Weights:
    model = model_of(state, heads, decoder_heads)
    (pred,) = needed(state, ["ar_pred.weight"], path)
    params = read(state, model, full_shapes(model, len(pred)))
    notes = assumed(path, ("mean", "std"), "ImageNet's, as in pretraining here,")
    return Weights(model, params, None, str(path), notes=notes)


def _save(weights: Weights, path: Path):
    """Writes {"model": state dict} as .pth, or the state dict as .safetensors."""
    model = weights.model
    usual = {n: getattr(Model, n) for n in ("segments", "cls_mask", "eps", "activation")}
    usual["taps"] = dataclasses.replace(model, taps=None).resolved().taps
    for name, official in usual.items():
        if getattr(model, name) != official:
            raise UserError(
                f"the official code has {name} {official}, {weights.source} has "
                f"{getattr(model, name)}: use --to=flax or safetensors"
            )
    missing = [name for name in DECODERS if f"{name}/token" not in weights.params]
    if missing:
        raise UserError(f"the official layout has both decoders, {weights.source} no {missing[0]}")
    state = write(weights.params, model)
    if path.suffix == ".safetensors":
        files.write_safetensors(path, state, {"format": "pt"})
    else:
        files.write_torch(path, {"model": state})


LAYOUT = Layout(
    "digpt",
    found=lambda state, path: state is not None and "ar_token" in state,
    read=_read,
    table=lambda weights: entries(weights.model),
    save=_save,
    suffixes=(".pth", ".safetensors"),
    full=True,
)
