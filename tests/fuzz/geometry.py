"""Segments, views and codecs: what must hold for any size, scale and finite value."""

import functools

import jax
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dgpt_jax import digpt, segments, token_codec, views

SEGMENTS = st.tuples(st.integers(1, 4), st.integers(1, 4))


def split_is_a_partition(draw, _):
    """Every patch is in one segment, segments are rectangles, and orders permute them."""
    of, height, width = draw(SEGMENTS), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    rows, cols = of[0] * height, of[1] * width
    grid = np.stack(np.meshgrid(np.arange(rows), np.arange(cols), indexing="ij"), axis=-1)
    parts = segments.split(grid, of)
    assert parts.shape == (segments.count(of), height * width, 2)
    assert len({tuple(place) for place in parts.reshape(-1, 2)}) == rows * cols
    for number, part in enumerate(parts):
        assert {(r // height, c // width) for r, c in part} == {divmod(number, of[1])}
        assert [tuple(p) for p in part] == sorted(tuple(p) for p in part)  # in raster order
    rng = np.random.default_rng(draw(st.integers(0, 1 << 40)))
    order = segments.sample_order(rng, of)
    assert sorted(order) == list(segments.raster_order(of))
    taken = np.take_along_axis(parts[None], order[None, :, None, None], axis=1)[0]
    assert all((taken[place] == parts[segment]).all() for place, segment in enumerate(order))


def masks_are_causal(draw, _):
    """Nobody sees a later segment, not even by way of others."""
    visible, tokens = draw(st.integers(1, 16)), draw(st.integers(1, 9))
    kind = draw(st.sampled_from(["official", "self"]))
    mask = segments.attention_mask(visible, tokens, kind)
    place = np.append(np.repeat(np.arange(visible), tokens), visible - 1)  # CLS knows all
    assert (mask[:-1, :-1] == (place[:-1, None] >= place[None, :-1])).all()
    assert mask[-1].all() and mask.diagonal().all()
    reached = np.linalg.matrix_power(mask.astype(float), 4) > 0
    assert not reached[place[:, None] < place[None, :]].any()
    if kind == "self":
        assert not mask[:-1, -1].any()


def pair(draw, low: float, high: float):
    return tuple(sorted(draw(st.tuples(*[st.floats(low, high, exclude_min=True)] * 2))))


def crops_lie_inside(draw, _):
    size = st.one_of(st.integers(1, 20), st.integers(1, 100_000))
    height, width = draw(size), draw(size)
    scale = draw(st.sampled_from([(0.2, 1.0), (1.0, 1.0)])) if draw(st.booleans()) else None
    view = views.draw(
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


def pictures_are_rendered(draw, _):
    rng = np.random.default_rng(draw(st.integers(0, 1 << 40)))
    height, width, size = (draw(st.integers(1, 60)) for _ in range(3))
    image = np.empty((height, width, 3), np.uint8)
    image[:] = rng.integers(0, 256, 3)
    ratio = pair(draw, 0, 1e9)
    view = views.draw(rng, height, width, scale=pair(draw, 0, 1), ratio=ratio, flip=True)
    centred = views.centre_crop(
        image, size + draw(st.integers(0, 30)), size, squash=draw(st.booleans())
    )
    for picture in (views.render(image, view, size), centred):
        assert picture.shape == (size, size, 3) and picture.dtype == np.uint8
        assert (picture == image[0, 0]).all()


FLOATS = st.one_of(
    st.floats(-3, 3, width=32),
    st.sampled_from([0.0, -0.0, 1e-45, -1e-40, 1.1754944e-38, 65504.0, -65520.0, 3e38, -3.4e38]),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
)
TINIEST = float(np.finfo(np.float32).tiny)  # devices take less for zero


@functools.cache
def compiled(name: str):
    def both(tokens, scale):
        codec = token_codec.Codec(name, scale)
        return codec.encode(tokens), codec.decode(codec.encode(tokens))

    return jax.jit(both)


def codecs_keep_their_bound(draw, _):
    """Decoded tokens are off by half a step, up to a factor a token; int4 clips what sticks out."""
    name = draw(st.sampled_from(sorted(token_codec.CODECS)))
    tokens = draw(arrays.arrays(np.float32, (3, 8), elements=FLOATS))
    if draw(st.booleans()):  # a channel that drowns the others
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
    wanted = np.clip(scaled, -full, full) * (levels / np.where(full > 0, full, 1))
    assert np.abs(steps - wanted).max() <= 0.5 + 1e-4, (tokens, codec.scale, steps, wanted)


def takes_follow_the_order(draw, _):
    """The gather of the model gives the segments in the order's order."""
    of = draw(SEGMENTS)
    order = segments.sample_order(np.random.default_rng(draw(st.integers(0, 99))), of)[None]
    numbers = np.arange(segments.count(of), dtype=np.float32)[None, :, None, None]
    assert (np.asarray(digpt.take(numbers, order))[0, :, 0, 0] == order[0]).all()
