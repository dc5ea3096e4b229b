"""The official D-iGPT's state dict (`models_digpt.py`): `ar` is our `next`, `kd` our `visible`.

Except on the way from the encoder: `forward_encoder` returns the `kd` features first and `forward`
takes them as the `ar` ones, so `kd_enc_norm` and `kd_enc2dec` feed the `ar` decoder, and `ar_enc_*`
the `kd` one. The table below undoes that, so that a decoder here holds what it really uses.
"""

import numpy as np

from dgpt_jax import segments
from dgpt_jax.config import SIZES, Model
from dgpt_jax.convert import layout
from dgpt_jax.convert.layout import Entry, linear, norm
from dgpt_jax.schema import UserError, parse

# Our decoder: the official prefix of its blocks, and that of its encoder features.
DECODERS = {"next": ("ar", "kd"), "visible": ("kd", "ar")}
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
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    decoder_width = state["ar_token"].shape[-1]
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
            depth=1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks.")),
            image_size=patch * round((state["pos_embed"].shape[1] - 1) ** 0.5),
            mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / width,
            decoder_width=decoder_width,
            decoder_depth=1 + max(int(k.split(".")[1]) for k in state if "ar_blocks." in k),
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
        if name not in state or not np.allclose(state[name], expected, atol=1e-5):
            raise UserError(f"official D-iGPT weights: {name} is not the fixed one of {model}")
    return layout.read(entries(model), state, shapes, ignore=FIXED, what="official D-iGPT weights")


def write(params, model: Model) -> dict[str, np.ndarray]:
    """An official state dict from flat parameters of the pretraining model."""
    return layout.write(entries(model), params) | fixed_arrays(model)
