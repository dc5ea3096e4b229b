"""Figures drawn with NumPy and OpenCV: segment orders, heat maps, sheets of image rows."""

from collections.abc import Mapping

import cv2
import jax
import numpy as np

from dgpt_jax.config import TrainConfig
from dgpt_jax.data import segments
from dgpt_jax.distributed import sharding
from dgpt_jax.evals import feature_maps

Maps = Mapping[str, Mapping[str, np.ndarray]]  # of feature_maps.prediction_maps
UNKNOWN = 0.87  # gray, where a map has no value
MARGIN, SIDE = 150, 112  # pixels of a sheet: title column, each image


def draw_order(image: np.ndarray, order: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """An enlarged image with its segments numbered by rank in the order; the last one, which the
    encoder never sees, is pale."""
    times = max(1, -(-192 // len(image)))
    canvas = np.ascontiguousarray(image.repeat(times, axis=0).repeat(times, axis=1))
    height, width = len(canvas) // shape[0], len(canvas) // shape[1]
    for rank, segment in enumerate(order):
        top, left = segment // shape[1] * height, segment % shape[1] * width
        block = canvas[top : top + height, left : left + width]
        if rank >= segments.visible_count(shape):
            block[:] = 255 - (255 - block) // 3
        corner = (left + width - 1, top + height - 1)
        cv2.rectangle(canvas, (left, top), corner, (255, 255, 255), 1)
        origin = (left + width // 12, top + height // 3)
        for color, thickness in (((255, 255, 255), 5), ((200, 0, 0), 2)):
            font, scale = cv2.FONT_HERSHEY_SIMPLEX, height / 90
            cv2.putText(canvas, str(rank + 1), origin, font, scale, color, thickness)
    return canvas


def heat(values: np.ndarray, low: float = 0.0, high: float | None = None) -> np.ndarray:
    """Maps (B, G, G) as colors uint8 (B, G, G, 3), scaled from `low` to `high` (None: each map's
    maximum); NaN is gray."""
    top = np.nanmax(values, axis=(1, 2), keepdims=True) if high is None else high
    scaled = np.clip((values - low) / np.maximum(top - low, 1e-12), 0, 1)
    flat = np.nan_to_num(255 * scaled).round().astype(np.uint8).reshape(-1, 1)
    colors = cv2.applyColorMap(flat, cv2.COLORMAP_VIRIDIS)[..., ::-1].reshape(*values.shape, 3)
    return np.where(np.isnan(values)[..., None], round(255 * UNKNOWN), colors).astype(np.uint8)


def prediction_rows(
    maps: Maps, images: np.ndarray, orders: np.ndarray, shape: tuple[int, int]
) -> dict[str, np.ndarray]:
    """{title: images or maps (B, height, width, 3)} of feature_maps.prediction_maps: the order on
    the image; tokens of the teacher and each decoder, colored jointly; their cosines."""
    rows = {"image, order": _draw_orders(images, orders, shape)}
    tokens = {"teacher": teacher(maps)}
    tokens |= {f"{name}: predicted": decoder["prediction"] for name, decoder in maps.items()}
    # Unit vectors: the loss compares directions and ignores lengths.
    tokens = {title: feature_maps.unit(x) for title, x in tokens.items()}
    masks = {title: ~np.isnan(x[..., 0]) for title, x in tokens.items()}
    vectors = np.concatenate([tokens[title][mask] for title, mask in masks.items()])
    colors = feature_maps.pca_colors(vectors[None])[0]
    for title, mask in masks.items():
        rows[title] = image = np.full((*mask.shape, 3), UNKNOWN)
        image[mask], colors = np.split(colors, [mask.sum()])
    return rows | {f"{n}: cosine": heat(m["similarity"], 0.0, 1.0) for n, m in maps.items()}


def teacher(maps: Maps) -> np.ndarray:
    """The teacher's tokens (B, G, G, C) where some decoder predicts them, else NaN."""
    tokens = np.full_like(next(iter(maps.values()))["teacher"], np.nan)
    for decoder in maps.values():
        tokens = np.where(np.isnan(tokens), decoder["teacher"], tokens)
    return tokens


def mean_token_cosine(maps: Maps) -> np.ndarray:
    """Cosines (B, G, G) of the teacher's tokens to their mean, the score of a constant guess."""
    tokens = feature_maps.unit(teacher(maps))
    return tokens @ feature_maps.unit(np.nanmean(tokens, axis=(0, 1, 2)))


def prediction_captions(
    maps: Maps, guess: np.ndarray, orders: np.ndarray, shape: tuple[int, int]
) -> dict[str, list[str]]:
    """{title: captions, one per image}: mean cosines by rank in the order, of the predictions and
    of a `guess` (B, G, G) at the same ranks."""
    captions = {
        f"{name}: cosine": _by_rank(decoder["similarity"], orders, shape, name)
        for name, decoder in maps.items()
    }
    guesses = [[f"{name} {line}" for line in _by_rank(guess, orders, shape, name)] for name in maps]
    return captions | {"mean token: cosine": ["\n".join(x) for x in zip(*guesses, strict=True)]}


def _by_rank(values: np.ndarray, orders: np.ndarray, shape, name: str) -> list[str]:
    """Means of maps (B, G, G) over each segment that a decoder predicts, in order."""
    means = segments.split(values[..., None], shape)[..., 0].mean(axis=-1)
    ranks = segments.predicted_ranks(name, segments.visible_count(shape))
    return [
        " ".join(f"{row[segment]:.2f}" for segment in order[ranks])
        for row, order in zip(means, orders, strict=True)
    ]


def sheet(rows: dict[str, np.ndarray]) -> np.ndarray:
    """One image, uint8 (height, width, 3), with a titled row for each entry: images as uint8 or
    floats in [0, 1]. Small maps are enlarged without smoothing."""
    lines = []
    for title, images in rows.items():
        margin = np.full((SIDE, MARGIN, 3), 255, np.uint8)
        font = cv2.FONT_HERSHEY_SIMPLEX
        cv2.putText(margin, title, (4, SIDE // 2), font, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
        cells = [margin, *map(_cell, images)]
        lines.append(np.concatenate([_pad(cell) for cell in cells], axis=1))
    return np.concatenate(lines)


def _cell(image: np.ndarray) -> np.ndarray:
    image = image if image.dtype == np.uint8 else (255 * image).round().astype(np.uint8)
    interpolation = cv2.INTER_AREA if len(image) > SIDE else cv2.INTER_NEAREST
    return cv2.resize(image, (SIDE, SIDE), interpolation=interpolation)


def _pad(cell: np.ndarray) -> np.ndarray:
    return np.pad(cell, ((2, 2), (2, 2), (0, 0)), constant_values=255)


def first_crops(config: TrainConfig, batch: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """{"crops": figure of the first images of a batch, as the model gets them}."""
    examples = {name: batch[name] for name in ("image", "order") if name in batch}
    examples = sharding.take_local(examples, config.evals.figures)
    return {"crops": crops(examples, config.model.segments)}


def crops(batch: dict[str, np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Sheet of a step's input images, with their segment orders if the batch has some."""
    if "order" not in batch:
        return sheet({"image": batch["image"]})
    return sheet({"image, order": _draw_orders(batch["image"], batch["order"], shape)})


def _draw_orders(images, orders, shape) -> np.ndarray:
    return np.stack([draw_order(*pair, shape) for pair in zip(images, orders, strict=True)])
