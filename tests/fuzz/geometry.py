"""Properties of segments, views and codecs for any size, scale and finite value."""

import functools

import jax
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dgpt_jax.data import image_ops, segments, token_codec
from dgpt_jax.models import digpt

SEGMENTS = st.tuples(st.integers(1, 4), st.integers(1, 4))


def split_is_a_partition(draw, _):
    """Every patch is in one segment, segments are rectangles, and orders permute them."""
    shape, height, width = draw(SEGMENTS), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    rows, cols = shape[0] * height, shape[1] * width
    grid = np.stack(np.meshgrid(np.arange(rows), np.arange(cols), indexing="ij"), axis=-1)
    blocks = segments.split(grid, shape)
    assert blocks.shape == (segments.count(shape), height * width, 2)
    assert len({tuple(patch) for patch in blocks.reshape(-1, 2)}) == rows * cols
    for number, block in enumerate(blocks):
        assert {(r // height, c // width) for r, c in block} == {divmod(number, shape[1])}
        assert [tuple(p) for p in block] == sorted(tuple(p) for p in block)  # in raster order
    rng = np.random.default_rng(draw(st.integers(0, 1 << 40)))
    order = segments.sample_order(rng, shape)
    assert sorted(order) == list(segments.raster_order(shape))
    gathered = np.take_along_axis(blocks[None], order[None, :, None, None], axis=1)[0]
    assert all((gathered[rank] == blocks[segment]).all() for rank, segment in enumerate(order))


def masks_are_causal(draw, _):
    """No token attends to a later segment, not even through other tokens."""
    visible, tokens = draw(st.integers(1, 16)), draw(st.integers(1, 9))
    kind = draw(st.sampled_from(["official", "self"]))
    mask = segments.attention_mask(visible, tokens, kind)
    rank = np.append(np.repeat(np.arange(visible), tokens), visible - 1)  # CLS attends to all
    assert (mask[:-1, :-1] == (rank[:-1, None] >= rank[None, :-1])).all()
    assert mask[-1].all() and mask.diagonal().all()
    reached = np.linalg.matrix_power(mask.astype(float), 4) > 0
    assert not reached[rank[:, None] < rank[None, :]].any()
    if kind == "self":
        assert not mask[:-1, -1].any()


def pair(draw, low: float, high: float):
    return tuple(sorted(draw(st.tuples(*[st.floats(low, high, exclude_min=True)] * 2))))


def crops_lie_inside(draw, _):
    size = st.one_of(st.integers(1, 20), st.integers(1, 100_000))
    height, width = draw(size), draw(size)
    scale = draw(st.sampled_from([(0.2, 1.0), (1.0, 1.0)])) if draw(st.booleans()) else None
    view = image_ops.draw_view(
        np.random.default_rng(draw(st.integers(0, 1 << 40))),
        height,
        width,
        scale=scale or pair(draw, 0, 1),
        ratio=pair(draw, 0, 1e300),
        flip=draw(st.booleans()),
    )
    assert view.top >= 0 and view.top + view.height <= height and view.height >= 1
    assert view.left >= 0 and view.left + view.width <= width and view.width >= 1
    assert all(isinstance(number, int) for number in view.box)


def views_are_rendered(draw, _):
    rng = np.random.default_rng(draw(st.integers(0, 1 << 40)))
    height, width, size = (draw(st.integers(1, 60)) for _ in range(3))
    image = np.empty((height, width, 3), np.uint8)
    image[:] = rng.integers(0, 256, 3)
    ratio = pair(draw, 0, 1e9)
    view = image_ops.draw_view(rng, height, width, scale=pair(draw, 0, 1), ratio=ratio, flip=True)
    centered = image_ops.center_crop(
        image, size + draw(st.integers(0, 30)), size, squash=draw(st.booleans())
    )
    for rendered in (image_ops.render(image, view, size), centered):
        assert rendered.shape == (size, size, 3) and rendered.dtype == np.uint8
        assert (rendered == image[0, 0]).all()


FLOATS = st.one_of(
    st.floats(-3, 3, width=32),
    st.sampled_from([0.0, -0.0, 1e-45, -1e-40, 1.1754944e-38, 65504.0, -65520.0, 3e38, -3.4e38]),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
)
TINIEST = float(np.finfo(np.float32).tiny)  # devices flush smaller values to zero


@functools.cache
def compiled(name: str):
    def encode_decode(tokens, scale):
        codec = token_codec.Codec(name, scale)
        return codec.encode(tokens), codec.decode(codec.encode(tokens))

    return jax.jit(encode_decode)


def codec_errors_are_bounded(draw, _):
    """Errors of decoded tokens are at most half a step of each token's scale; int4 also clips."""
    name = draw(st.sampled_from(sorted(token_codec.CODECS)))
    tokens = draw(arrays.arrays(np.float32, (3, 8), elements=FLOATS))
    if draw(st.booleans()):  # an outlier channel
        tokens[:, draw(st.integers(0, 7))] *= np.float32(1e4)
    tokens = np.nan_to_num(tokens)
    sample = tokens if draw(st.booleans()) else np.ones((1, 8), np.float32)
    codec, _ = token_codec.fit(sample, name)
    assert np.isfinite(codec.scale).all() and (codec.scale > 0).all()
    stored, decoded = map(np.asarray, compiled(name)(tokens, codec.scale))
    assert np.isfinite(decoded).all() and token_codec.is_finite(stored)
    tokens[np.abs(tokens) < TINIEST] = 0
    exact = tokens.astype(np.float64)
    if name == "float16":
        limited = np.clip(exact, -65504, 65504)
        assert (np.abs(decoded - limited) <= np.abs(limited) * 2**-11 + 2**-24).all()
        return
    assert stored.shape[-1] == token_codec.stored_width(name, 8)
    levels = token_codec.LEVELS[name]
    scaled = exact / codec.scale.astype(np.float64)
    full = np.abs(scaled).max(axis=-1, keepdims=True)
    if name == "int4":
        full = np.minimum(
            full, token_codec.CLIP_INT4 * np.sqrt(np.square(scaled).mean(axis=-1, keepdims=True))
        )
    steps = decoded.astype(np.float64) / codec.scale.astype(np.float64)
    assert np.abs(steps).max() <= levels * (1 + 1e-6)
    expected = np.clip(scaled, -full, full) * (levels / np.where(full > 0, full, 1))
    assert np.abs(steps - expected).max() <= 0.5 + 1e-4, (tokens, codec.scale, steps, expected)


def gathers_follow_the_order(draw, _):
    """The model gathers segments in the given order."""
    shape = draw(SEGMENTS)
    order = segments.sample_order(np.random.default_rng(draw(st.integers(0, 99))), shape)[None]
    numbers = np.arange(segments.count(shape), dtype=np.float32)[None, :, None, None]
    assert (np.asarray(digpt.take(numbers, order))[0, :, 0, 0] == order[0]).all()
