"""D-iGPT: the encoder under a block-causal mask, and the `next` and `visible` decoders.

Shape suffixes: B batch, N tokens, S segments, V visible segments, T tokens a segment, D encoder
width, E decoder width, C teacher width, L layers. `order_BS[b, i]` is the segment at place i.
Source: arXiv 2312.02147 section 3; `models_digpt.py` of the official code, quirks included
(the CLS token is last; one LayerNorm of eps 1e-5 shared by all taps; interleaved decoder inputs).
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from dgpt_jax import losses, segments, vit
from dgpt_jax.remat import kept, rematerialised
from dgpt_jax.transformer import Attention, CrossAttention, LayerNorm, Mlp, scan_blocks, xavier


class DecoderBlock(nn.Module):
    """q += self-attention; q += cross-attention to features; q += MLP, all pre-LN."""

    heads: int
    mlp_ratio: float
    dtype: Any

    @nn.compact
    def __call__(self, q_BNE, mask_NN, kv_BNE):
        def norm(name, x):
            return LayerNorm(1e-6, self.dtype, name=name)(x)

        attn1 = Attention(self.heads, self.dtype, name="attn1")
        attn2 = CrossAttention(self.heads, self.dtype, name="attn2")
        mlp = Mlp(self.mlp_ratio, "gelu", self.dtype, name="mlp")
        q_BNE = q_BNE + kept(attn1(norm("norm1", q_BNE), mask_NN))
        q_BNE = q_BNE + kept(attn2(norm("norm2_1", q_BNE), norm("norm2_2", kv_BNE), mask_NN))
        return q_BNE + mlp(norm("norm2", q_BNE))


class Decoder(nn.Module):
    """From tapped features and the positions of its queries to predictions of teacher tokens."""

    width: int
    depth: int
    heads: int
    out_width: int
    mlp_ratio: float
    remat: str
    dtype: Any

    @nn.compact
    def __call__(self, taps, positions_BNE, mask_NN):
        """taps: a list of (B, N, D); positions (B, N, E), CLS last. Returns (B, N, C) float32."""
        # One norm for all taps, as in the official code.
        norm = LayerNorm(1e-5, self.dtype, name="enc_norm")
        features = jnp.concatenate([norm(tap) for tap in taps], axis=-1)
        batch, tokens, _ = features.shape
        kv = nn.Dense(
            self.width * self.depth,
            kernel_init=xavier,
            dtype=self.dtype,
            name="enc2dec",
        )(features)
        # Interleaved: channel d of block i comes from output d·depth + i.
        kv_LBNE = jnp.moveaxis(kv.reshape(batch, tokens, self.width, self.depth), -1, 0)
        token = self.param("token", nn.initializers.normal(0.02), (1, 1, self.width))
        block = rematerialised(DecoderBlock, self.remat)(
            self.heads, self.mlp_ratio, self.dtype, name="blocks"
        )
        queries, _ = scan_blocks(block, self.depth, token + positions_BNE, mask_NN, kv_LBNE)
        queries = LayerNorm(1e-6, self.dtype, name="norm")(queries)
        pred = nn.Dense(self.out_width, kernel_init=xavier, dtype=self.dtype, name="pred")
        return pred(queries).astype(jnp.float32)


class Direct(nn.Module):
    """Plain feature distillation: predictions of what the encoder sees, without a decoder."""

    out_width: int
    dtype: Any

    @nn.compact
    def __call__(self, last_BND):
        """The last block's residuals (B, N, D) to predictions (B, N, C) float32."""
        normed = LayerNorm(1e-6, self.dtype, name="norm")(last_BND)
        pred = nn.Dense(self.out_width, kernel_init=xavier, dtype=self.dtype, name="pred")
        return pred(normed).astype(jnp.float32)


class DiGPT(nn.Module):
    """The pretraining model. `decoders` names those that exist, of "next", "visible", "direct"."""

    encoder: vit.Encoder
    segments: tuple[int, int]
    taps: tuple[int, ...]
    decoder_width: int
    decoder_depth: int
    decoder_heads: int
    out_width: int
    cls_mask: str = "official"
    decoders: tuple[str, ...] = ("next", "visible")

    def setup(self):
        for name in self.decoders:
            if name == "direct":
                self.direct = Direct(self.out_width, self.encoder.dtype)
                continue
            decoder = Decoder(
                width=self.decoder_width,
                depth=self.decoder_depth,
                heads=self.decoder_heads,
                out_width=self.out_width,
                mlp_ratio=self.encoder.mlp_ratio,
                remat=self.encoder.remat,
                dtype=self.encoder.dtype,
            )
            setattr(self, name, decoder)

    def __call__(self, images, order_BS):
        """Normalised images (B, height, width, 3) and orders, int (B, S), to {name: (B, V·T+1, C)}.

        Predictions of `next` stand for the segments at places 1..S-1 of the order, those of
        `visible` and `direct` for places 0..V-1, patch by patch, then for the teacher's CLS token.
        """
        taps, mask_NN = self.encode(images, order_BS)
        positions_BSTE = self.query_positions(order_BS, images.shape[1] // self.encoder.patch)
        return {name: self.decode(name, taps, positions_BSTE, mask_NN) for name in self.decoders}

    def encode(self, images, order_BS):
        """The tapped features, a list of (B, V·T+1, D) with CLS last, and the mask."""
        x_BND, mask_NN = self.enter(images, order_BS)
        last_BND, inputs_LBND = self.encoder.transform(x_BND, mask_NN)
        taps = [last_BND if d == self.encoder.depth else inputs_LBND[d] for d in self.taps]
        return taps, mask_NN

    def enter(self, images, order_BS):
        """What the first block gets (B, V·T+1, D), CLS last, and the mask."""
        patches = self.encoder.embed(images)
        _, rows, cols, width = patches.shape
        positions = segments.sincos_positions(width, rows, cols)
        x_BSTD = segments.split(patches + positions, self.segments)
        visible = segments.visible_count(self.segments)
        x_BVTD = take(x_BSTD, order_BS[:, :visible])
        # The last segment of the order never enters; CLS has position zero.
        x_BND = append_cls(x_BVTD, self.encoder.cls_token)
        return x_BND, segments.attention_mask(visible, x_BVTD.shape[2], self.cls_mask)

    def query_positions(self, order_BS, side: int):
        """Positions of the decoders' queries on a grid of side² patches, in order (B, S, T, E)."""
        positions = segments.sincos_positions(self.decoder_width, side, side)
        return take(segments.split(positions, self.segments)[None], order_BS)

    def decode(self, name: str, taps, positions_BSTE, mask_NN):
        """What one decoder predicts, (B, V·T+1, C), from what `encode` and the above give."""
        if name == "direct":
            return self.direct(taps[-1])
        places = segments.predicted_places(name, segments.visible_count(self.segments))
        positions_BNE = append_cls(positions_BSTE[:, places], 0.0)
        return getattr(self, name)(taps, positions_BNE, mask_NN)


def take(x_BSTD, order_BP):
    """The segments of each image in its order: (B or 1, S, T, D), int (B, P) to (B, P, T, D)."""
    return jnp.take_along_axis(x_BSTD, order_BP[:, :, None, None], axis=1)


def append_cls(x_BVTD, cls):
    """(B, V, T, D) to (B, V·T+1, D) with `cls`, broadcastable to (B, 1, D), as the last token."""
    batch, _, _, width = x_BVTD.shape
    cls = jnp.broadcast_to(jnp.asarray(cls, x_BVTD.dtype), (batch, 1, width))
    return jnp.concatenate([x_BVTD.reshape(batch, -1, width), cls], axis=1)


def token_losses(predictions, tokens, order_BS, *, grid: tuple[int, int], segment_grid, cls: bool):
    """{name: (B,)}: mean of 2-2cos between predictions and the teacher's tokens, in [0, 4].

    predictions: what DiGPT returns. tokens (B, [1+]rows·cols, C) of a teacher with `rows`×`cols`
    square grid, CLS first where `cls`; without it, predictions of CLS are left out. `grid` is the
    student's. Where the teacher's grid divides by the segments, predictions are resized to it,
    before they are normalised; otherwise the teacher's tokens are resized to the student's grid.
    """
    aligned = align(predictions, tokens, order_BS, grid=grid, segment_grid=segment_grid, cls=cls)
    result = {}
    for name, (pred_BVTC, target_BVTC) in aligned.items():
        pairs = losses.cosine_loss(pred_BVTC, target_BVTC).reshape(len(tokens), -1)
        if cls:
            pair = losses.cosine_loss(predictions[name][:, -1:], tokens[:, :1])
            pairs = jnp.concatenate([pairs, pair], axis=1)
        result[name] = pairs.mean(axis=1)
    return result


def align(predictions, tokens, order_BS, *, grid: tuple[int, int], segment_grid, cls: bool):
    """{name: (predictions, the teacher's tokens)} patch by patch, both (B, V, T, C), on one grid;
    of `next` for places 1..S-1 of the order, of the others for 0..V-1. Takes what token_losses has.
    """
    patches = tokens[:, 1:] if cls else tokens
    side = round(patches.shape[1] ** 0.5)
    teacher_grid = (side, side)
    batch, _, width = patches.shape
    if any(t % s for t, s in zip(teacher_grid, segment_grid, strict=True)):
        resize = segments.resize_matrix(teacher_grid, grid)
        patches = jnp.einsum("mn,bnc->bmc", resize, patches.astype(jnp.float32))
        teacher_grid = grid
    target_BSTC = segments.split(patches.reshape(batch, *teacher_grid, width), segment_grid)
    target_BSTC = take(target_BSTC, order_BS)
    student = tuple(g // s for g, s in zip(grid, segment_grid, strict=True))
    teacher = tuple(g // s for g, s in zip(teacher_grid, segment_grid, strict=True))
    visible = segments.visible_count(segment_grid)
    result = {}
    for name, prediction in predictions.items():
        pred_BVTC = prediction[:, :-1].reshape(batch, visible, -1, width)
        if student != teacher:
            resize = segments.resize_matrix(student, teacher)
            pred_BVTC = jnp.einsum("mt,bvtc->bvmc", resize, pred_BVTC)
        result[name] = pred_BVTC, target_BSTC[:, segments.predicted_places(name, visible)]
    return result


def pixel_losses(predictions, images, order_BS, *, patch: int, segment_grid):
    """{"next"}: (B,) mean squared error to the normalised pixels of the next segments; no CLS."""
    target = losses.normalise_patches(vit.patchify(images, patch))
    target_BSTC = take(segments.split(target, segment_grid), order_BS)[:, 1:]
    pairs = losses.pixel_loss(predictions["next"][:, :-1].reshape(target_BSTC.shape), target_BSTC)
    return {"next": pairs.mean(axis=(1, 2))}


def build(model, *, out_width: int, decoders=("next", "visible"), dtype=jnp.float32) -> DiGPT:
    """The DiGPT of a `config.Model`; `out_width` is the teacher's C, or a patch's values."""
    return DiGPT(
        encoder=vit.encoder(model, dtype),
        segments=model.segments,
        taps=model.taps,
        decoder_width=model.decoder_width,
        decoder_depth=model.decoder_depth,
        decoder_heads=model.decoder_heads,
        out_width=out_width,
        cls_mask=model.cls_mask,
        decoders=tuple(decoders),
    )


def dummy_inputs(model):
    """(images, order) of batch 1 for initialisation, from a `config.Model`."""
    size = model.image_size
    return (
        np.zeros((1, size, size, 3), np.float32),
        segments.raster_order(model.segments)[None],
    )
