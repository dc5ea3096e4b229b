"""Geometry of segments: which patches belong together, their order, who may see whom. NumPy only.

An image is a grid of `rows`×`cols` patches, cut into `segments` = (segment rows, segment columns)
equal rectangles. Segments are numbered in raster order, and so are the patches inside one. With S
segments, the first V = S-1 of an image's order are visible to the encoder (V = 1 where S = 1).
Source: D-iGPT, section 3 and `models_digpt.py` (`raster`, `mask_generate`, `forward_loss`).
"""

import numpy as np


def count(segments: tuple[int, int]) -> int:
    """S, the number of segments."""
    return segments[0] * segments[1]


def visible_count(segments: tuple[int, int]) -> int:
    """V, the number of segments that the encoder sees."""
    return max(1, count(segments) - 1)


def predicted_places(name: str, visible: int) -> slice:
    """Which places of an order the predictions called `name` stand for: `next` places 1..V, the
    others (`visible`, `direct`) what the encoder sees, 0..V-1."""
    return slice(1, None) if name == "next" else slice(0, visible)


def split(grid: np.ndarray, segments: tuple[int, int]):
    """(..., rows, cols, C) to (..., S, T, C); works on NumPy and JAX arrays alike."""
    *lead, rows, cols, channels = grid.shape
    height, width = rows // segments[0], cols // segments[1]
    if (height * segments[0], width * segments[1]) != (rows, cols):
        raise ValueError(f"{segments} segments do not divide a grid of {rows}×{cols}")
    blocks = grid.reshape(*lead, segments[0], height, segments[1], width, channels)
    n = len(lead)
    axes = (*range(n), n, n + 2, n + 1, n + 3, n + 4)
    return blocks.transpose(axes).reshape(*lead, count(segments), height * width, channels)


def sample_order(rng: np.random.Generator, segments: tuple[int, int]) -> np.ndarray:
    """A uniformly random permutation of the segments, int32 (S,)."""
    return rng.permutation(count(segments)).astype(np.int32)


def raster_order(segments: tuple[int, int]) -> np.ndarray:
    """Segments from top left to bottom right, int32 (S,)."""
    return np.arange(count(segments), dtype=np.int32)


def attention_mask(visible: int, tokens: int, cls_mask: str = "official") -> np.ndarray:
    """Who (row) may attend to whom (column) among V·T patches and the CLS token, which is last.

    Returns bool (V·T+1, V·T+1). A patch sees its own and earlier segments; CLS sees everything.
    `cls_mask` says who sees CLS besides itself: "official", the last visible segment (the official
    code's mask, padded by reflection, gives this); "self", nobody; "all", every patch, so that
    earlier segments learn through it of later ones: it is there to be compared with.
    """
    place = np.repeat(np.arange(visible), tokens)
    mask = np.ones((visible * tokens + 1,) * 2, bool)
    mask[:-1, :-1] = place[:, None] >= place[None, :]
    mask[:-1, -1] = {"official": place == visible - 1, "self": False, "all": True}[cls_mask]
    return mask


def resize_matrix(source: tuple[int, int], target: tuple[int, int]) -> np.ndarray:
    """Bilinear interpolation of a raster of tokens as one matrix, float32 (target n, source n).

    Half-pixel centres, edges clamped, no antialiasing: `F.interpolate(mode="bilinear",
    align_corners=False)`, which the official loss applies to predictions.
    """

    def along(n_in: int, n_out: int) -> np.ndarray:
        centre = np.clip((np.arange(n_out) + 0.5) * n_in / n_out - 0.5, 0, n_in - 1)
        low = np.minimum(np.floor(centre).astype(int), max(n_in - 2, 0))
        weights = np.zeros((n_out, n_in))
        weights[np.arange(n_out), low] = 1 - (centre - low)
        weights[np.arange(n_out), np.minimum(low + 1, n_in - 1)] += centre - low
        return weights

    rows, cols = along(source[0], target[0]), along(source[1], target[1])
    return np.kron(rows, cols).astype(np.float32)


def sincos_positions(width: int, rows: int, cols: int) -> np.ndarray:
    """Fixed 2-D sin-cos positions, float32 (rows, cols, width); `width` a multiple of 4.

    The first half encodes the column, the second the row, each as sines then cosines, computed in
    float32 as `util/pos_embed.py` does.
    """
    omega = np.arange(width // 4, dtype=np.float32) / np.float32(width / 4)
    omega = (1.0 / 10000**omega).astype(np.float32)

    def encode(position):
        angle = position.astype(np.float32)[..., None] * omega
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)

    row, col = np.meshgrid(np.arange(rows), np.arange(cols), indexing="ij")
    return np.concatenate([encode(col), encode(row)], axis=-1).astype(np.float32)
