"""D-iGPT: the encoder under a block-causal mask with its decoders, and the losses.

Shape suffixes: B batch, N tokens, S segments, V visible segments, T tokens per segment, D encoder
width, E decoder width, C teacher width, L layers. `order_BS[b, i]` is the segment of rank i.
Source: arXiv 2312.02147 section 3; `models_digpt.py` of the official code, quirks included
(the CLS token is last; one LayerNorm of eps 1e-5 shared by all taps; interleaved decoder inputs).
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dgpt_jax.config import ModelConfig
from dgpt_jax.data import segments
from dgpt_jax.models import losses, vit
from dgpt_jax.models.decoders import Decoder, DistillationHead, Heads

DECODERS = ("next", "visible", "direct")


class DiGPT(nn.Module):
    """The pretraining model. `decoders` is a subset of "next", "visible" and "direct".

    teachers: (name, C) of each teacher whose tokens are predicted; the first is named "". With
    `separate` each has decoders of its own, otherwise a prediction head on the same decoders.
    Learned positions are a parameter `pos_embed` (1, 1+N, D), CLS first, as in Classifier, and
    start as the sin-cos table.
    """

    encoder: vit.Encoder
    segments: tuple[int, int]
    taps: tuple[int, ...]
    decoder_width: int
    decoder_depth: int
    decoder_heads: int
    teachers: tuple[tuple[str, int], ...]
    cls_mask: str = "official"
    decoders: tuple[str, ...] = ("next", "visible")
    learned_grid: int | None = None
    """Side of the grid of patches of learned positions; None: positions are fixed, sin-cos."""
    separate: bool = False

    def setup(self):
        if self.learned_grid is not None:
            table = segments.sincos_table(self.encoder.width, self.learned_grid)
            self.pos_embed = self.param("pos_embed", lambda key: jnp.asarray(table))
        for name in self.decoders:
            for module, heads in self.modules_of(name).items():
                setattr(self, module, self._decoder(name, tuple((h, w) for h, _, w in heads)))

    @property
    def out_width(self) -> int:
        """Width of the first teacher's tokens."""
        return dict(self.teachers)[""]

    def modules_of(self, name: str) -> dict[str, list[tuple[str, str, int]]]:
        """Returns {module: [(its head, prediction, width)]} of a decoder for all teachers."""
        if self.separate:
            return {
                join(name, teacher): [("pred", join(name, teacher), width)]
                for teacher, width in self.teachers
            }
        return {name: [(join("pred", t), join(name, t), width) for t, width in self.teachers]}

    def _decoder(self, name: str, heads: Heads) -> Decoder | DistillationHead:
        if name == "direct":
            return DistillationHead(heads, self.encoder.dtype)
        return Decoder(
            width=self.decoder_width,
            depth=self.decoder_depth,
            heads=self.decoder_heads,
            out_widths=heads,
            mlp_ratio=self.encoder.mlp_ratio,
            remat=self.encoder.remat,
            dtype=self.encoder.dtype,
        )

    def __call__(self, images: jax.Array, order_BS: jax.Array) -> dict[str, jax.Array]:
        """{prediction: (B, V·T+1, C)} of normalized images (B, height, width, 3) and orders, int
        (B, S): `join(decoder, teacher)` for every decoder and teacher.

        `next` predicts the segments of ranks 1..S-1 in the order, `visible` and `direct` those of
        ranks 0..V-1, patch by patch, then the teacher's CLS token.
        """
        taps, mask_NN = self.encode(images, order_BS)
        positions_BSTE = self.query_positions(order_BS, images.shape[1] // self.encoder.patch)
        predictions = {}
        for name in self.decoders:
            predictions |= self.decode(name, taps, positions_BSTE, mask_NN)
        return predictions

    def encode(self, images: jax.Array, order_BS: jax.Array) -> tuple[list[jax.Array], np.ndarray]:
        """Returns the tapped features, each (B, V·T+1, D) with CLS last, and the mask."""
        x_BND, mask_NN = self.embed_tokens(images, order_BS)
        last_BND, inputs_LBND = self.encoder.forward_blocks(x_BND, mask_NN)
        taps = [last_BND if d == self.encoder.depth else inputs_LBND[d] for d in self.taps]
        return taps, mask_NN

    def embed_tokens(self, images: jax.Array, order_BS: jax.Array) -> tuple[jax.Array, np.ndarray]:
        """Returns the input of the first block (B, V·T+1, D), CLS last, and the mask."""
        patches = self.encoder.embed(images)
        _, rows, cols, width = patches.shape
        cls = self.encoder.cls_token
        if self.learned_grid is None:  # CLS has position zero
            positions = segments.sincos_positions(width, rows, cols)
        else:
            positions = self.pos_embed[0, 1:].reshape(rows, cols, width)
            cls = cls + self.pos_embed[:, :1]
        x_BSTD = segments.split(patches + positions, self.segments)
        visible = segments.visible_count(self.segments)
        # The last segment of the order is left out.
        x_BVTD = take(x_BSTD, order_BS[:, :visible])
        x_BND = append_cls(x_BVTD, cls)
        return x_BND, segments.attention_mask(visible, x_BVTD.shape[2], self.cls_mask)

    def query_positions(self, order_BS: jax.Array, side: int) -> jax.Array:
        """Positions of the decoders' queries on a grid of side² patches, in order (B, S, T, E)."""
        positions = segments.sincos_positions(self.decoder_width, side, side)
        return take(segments.split(positions, self.segments)[None], order_BS)

    def decode(
        self, name: str, taps: list[jax.Array], positions_BSTE: jax.Array, mask_NN: np.ndarray
    ) -> dict[str, jax.Array]:
        """One decoder's predictions, as of the module, from `encode` and `query_positions`."""
        ranks = segments.predicted_ranks(name, segments.visible_count(self.segments))
        positions_BNE = append_cls(positions_BSTE[:, ranks], 0.0)
        predictions = {}
        for module, heads in self.modules_of(name).items():
            decoder = getattr(self, module)
            inputs = (taps[-1],) if name == "direct" else (taps, positions_BNE, mask_NN)
            by_head = decoder(*inputs)
            predictions |= {prediction: by_head[head] for head, prediction, _ in heads}
        return predictions


def join(name: str, teacher: str) -> str:
    """Returns `next` for the first teacher (""), `next_NAME` for a further one."""
    return f"{name}_{teacher}" if teacher else name


def take(x_BSTD: np.ndarray | jax.Array, order_BP: jax.Array) -> jax.Array:
    """Segments of each image in its order: (B or 1, S, T, D), int (B, P) to (B, P, T, D)."""
    return jnp.take_along_axis(x_BSTD, order_BP[:, :, None, None], axis=1)


def append_cls(x_BVTD: jax.Array, cls: jax.Array | float) -> jax.Array:
    """Flattens (B, V, T, D) to (B, V·T+1, D) with `cls`, broadcast to (B, 1, D), as last token."""
    batch, _, _, width = x_BVTD.shape
    cls = jnp.broadcast_to(jnp.asarray(cls, x_BVTD.dtype), (batch, 1, width))
    return jnp.concatenate([x_BVTD.reshape(batch, -1, width), cls], axis=1)


def token_losses(
    predictions: Mapping[str, jax.Array],
    tokens: jax.Array,
    order_BS: jax.Array,
    *,
    grid: tuple[int, int],
    segment_grid: tuple[int, int],
    cls: bool,
) -> dict[str, jax.Array]:
    """{name: (B,)}: mean of 2-2cos between predictions and the teacher's tokens, in [0, 4].

    predictions: from DiGPT. tokens (B, [1+]rows·cols, C) of a teacher with a square grid, CLS first
    if `cls`; otherwise predictions of CLS are ignored. `grid` is the student's. If the segments
    divide the teacher's grid, predictions are resized to it before they are normalized; otherwise
    the teacher's tokens are resized to the student's grid.
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


def align(
    predictions: Mapping[str, jax.Array],
    tokens: jax.Array,
    order_BS: jax.Array,
    *,
    grid: tuple[int, int],
    segment_grid: tuple[int, int],
    cls: bool,
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """{name: (predictions, the teacher's tokens)} by patch, both (B, V, T, C), on the same grid.

    Ranks 1..S-1 of the order for `next`, 0..V-1 for the others. Arguments as of token_losses.
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
    student = (grid[0] // segment_grid[0], grid[1] // segment_grid[1])
    teacher = (teacher_grid[0] // segment_grid[0], teacher_grid[1] // segment_grid[1])
    visible = segments.visible_count(segment_grid)
    result = {}
    for name, prediction in predictions.items():
        pred_BVTC = prediction[:, :-1].reshape(batch, visible, -1, width)
        if student != teacher:
            resize = segments.resize_matrix(student, teacher)
            pred_BVTC = jnp.einsum("mt,bvtc->bvmc", resize, pred_BVTC)
        result[name] = pred_BVTC, target_BSTC[:, segments.predicted_ranks(name, visible)]
    return result


def pixel_losses(
    predictions: Mapping[str, jax.Array],
    images: jax.Array,
    order_BS: jax.Array,
    *,
    patch: int,
    segment_grid: tuple[int, int],
) -> dict[str, jax.Array]:
    """{"next": (B,)}: mean squared error to the next segments' normalized pixels, without CLS."""
    target = losses.normalize_patches(vit.patchify(images, patch))
    target_BSTC = take(segments.split(target, segment_grid), order_BS)[:, 1:]
    pairs = losses.pixel_loss(predictions["next"][:, :-1].reshape(target_BSTC.shape), target_BSTC)
    return {"next": pairs.mean(axis=(1, 2))}


def build(
    model: ModelConfig,
    *,
    out_width: int | None = None,
    further: Mapping[str, int] = MappingProxyType({}),
    decoders: Iterable[str] = ("next", "visible"),
    dtype: Any = jnp.float32,
) -> DiGPT:
    """Returns the DiGPT of a config; `out_width` is the first teacher's C, or the values of a
    patch; None without the first. further: {name: C} of further teachers."""
    return DiGPT(
        encoder=vit.encoder(model, dtype),
        segments=model.segments,
        taps=model.taps,
        decoder_width=model.decoder_width,
        decoder_depth=model.decoder_depth,
        decoder_heads=model.decoder_heads,
        teachers=(*([("", out_width)] if out_width else []), *further.items()),
        cls_mask=model.cls_mask,
        decoders=tuple(decoders),
        learned_grid=model.grid if model.positions == "learned" else None,
        separate=model.separate_decoders,
    )


def dummy_inputs(model: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Returns (images, order) of batch 1 for initialization."""
    size = model.image_size
    return (np.zeros((1, size, size, 3), np.float32), segments.raster_order(model.segments)[None])
