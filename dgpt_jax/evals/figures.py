"""Drawing for eyes: segments on a picture, maps as colours, sheets of rows. NumPy and OpenCV."""

import cv2
import numpy as np

from dgpt_jax import maps, segments

UNKNOWN = 0.87  # grey, where a map says nothing
MARGIN, SIDE = 150, 112  # pixels of a sheet: its titles, each of its pictures


def ordered(picture: np.ndarray, order: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A picture, enlarged, with its segments numbered by their place in the order; the last one,
    which the encoder never sees, is pale."""
    times = max(1, -(-192 // len(picture)))
    drawn = np.ascontiguousarray(picture.repeat(times, axis=0).repeat(times, axis=1))
    high, wide = len(drawn) // shape[0], len(drawn) // shape[1]
    for place, segment in enumerate(order):
        top, left = segment // shape[1] * high, segment % shape[1] * wide
        part = drawn[top : top + high, left : left + wide]
        if place >= segments.visible_count(shape):
            part[:] = 255 - (255 - part) // 3
        corner = (left + wide - 1, top + high - 1)
        cv2.rectangle(drawn, (left, top), corner, (255, 255, 255), 1)
        where = (left + wide // 12, top + high // 3)
        for colour, thick in (((255, 255, 255), 5), ((200, 0, 0), 2)):
            cv2.putText(
                drawn, str(place + 1), where, cv2.FONT_HERSHEY_SIMPLEX, high / 90, colour, thick
            )
    return drawn


def heat(values: np.ndarray, low=0.0, high=None) -> np.ndarray:
    """(B, G, G) as colours uint8 (B, G, G, 3), from `low` to `high`, or to each map's largest
    value; NaN is grey."""
    most = np.nanmax(values, axis=(1, 2), keepdims=True) if high is None else high
    scaled = np.clip((values - low) / np.maximum(most - low, 1e-12), 0, 1)
    flat = np.nan_to_num(255 * scaled).round().astype(np.uint8).reshape(-1, 1)
    colours = cv2.applyColorMap(flat, cv2.COLORMAP_VIRIDIS)[..., ::-1].reshape(*values.shape, 3)
    return np.where(np.isnan(values)[..., None], round(255 * UNKNOWN), colours).astype(np.uint8)


def prediction_rows(found: dict, pictures: np.ndarray, orders: np.ndarray, shape) -> dict:
    """{title: pictures or maps (B, height, width, 3)} of what maps.prediction_maps gives: the order
    on the picture; tokens of the teacher and of each decoder, coloured together; their cosines."""
    rows = {"image, order": _ordered(pictures, orders, shape)}
    drawn = {"teacher": teacher(found)}
    drawn |= {f"{name}: predicted": part["prediction"] for name, part in found.items()}
    # Unit vectors: the loss compares directions, and a prediction may be of any length.
    drawn = {title: unit(tokens) for title, tokens in drawn.items()}
    known = {title: ~np.isnan(tokens[..., 0]) for title, tokens in drawn.items()}
    colours = maps.pca_colours(np.concatenate([drawn[t][known[t]] for t in drawn])[None])[0]
    for title, where in known.items():
        rows[title] = picture = np.full((*where.shape, 3), UNKNOWN)
        picture[where], colours = np.split(colours, [where.sum()])
    return rows | {f"{n}: cosine": heat(m["similarity"], 0.0, 1.0) for n, m in found.items()}


def teacher(found: dict) -> np.ndarray:
    """The teacher's tokens (B, G, G, C) wherever a decoder predicts some, else NaN."""
    tokens = np.full_like(next(iter(found.values()))["teacher"], np.nan)
    for part in found.values():
        tokens = np.where(np.isnan(tokens), part["teacher"], tokens)
    return tokens


def mean_token_cosine(found: dict) -> np.ndarray:
    """Cosines (B, G, G) of the teacher's tokens to their mean: what a constant guess has."""
    tokens = unit(teacher(found))
    return tokens @ unit(np.nanmean(tokens, axis=(0, 1, 2)))


def prediction_captions(found: dict, guess: np.ndarray, orders: np.ndarray, shape) -> dict:
    """{title: a caption for each image}: mean cosines by place in the order, of the predictions and
    of a `guess` (B, G, G) at the same places."""
    captions = {
        f"{name}: cosine": _by_place(part["similarity"], orders, shape, name)
        for name, part in found.items()
    }
    guesses = [
        [f"{name} {line}" for line in _by_place(guess, orders, shape, name)] for name in found
    ]
    return captions | {"mean token: cosine": ["\n".join(x) for x in zip(*guesses, strict=True)]}


def _by_place(values: np.ndarray, orders: np.ndarray, shape, name: str) -> list[str]:
    """The mean of maps (B, G, G) over each segment that a decoder predicts, in order."""
    means = segments.split(values[..., None], shape)[..., 0].mean(axis=-1)
    places = segments.predicted_places(name, segments.visible_count(shape))
    return [
        " ".join(f"{of_image[segment]:.2f}" for segment in order[places])
        for of_image, order in zip(means, orders, strict=True)
    ]


def unit(x: np.ndarray) -> np.ndarray:
    """Vectors along the last axis, of length 1."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def sheet(rows: dict[str, np.ndarray]) -> np.ndarray:
    """One picture, uint8 (height, width, 3), with a titled row of images for each entry: uint8, or
    floats in [0, 1]. Small maps are enlarged without blurring."""
    lines = []
    for title, images in rows.items():
        margin = np.full((SIDE, MARGIN, 3), 255, np.uint8)
        font = cv2.FONT_HERSHEY_SIMPLEX
        cv2.putText(margin, title, (4, SIDE // 2), font, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
        line = [margin, *map(_cell, images)]
        lines.append(np.concatenate([_framed(cell) for cell in line], axis=1))
    return np.concatenate(lines)


def _cell(image: np.ndarray) -> np.ndarray:
    image = image if image.dtype == np.uint8 else (255 * image).round().astype(np.uint8)
    how = cv2.INTER_AREA if len(image) > SIDE else cv2.INTER_NEAREST
    return cv2.resize(image, (SIDE, SIDE), interpolation=how)


def _framed(cell: np.ndarray) -> np.ndarray:
    return np.pad(cell, ((2, 2), (2, 2), (0, 0)), constant_values=255)


def crops(batch: dict[str, np.ndarray], shape) -> np.ndarray:
    """What a step gets to see, as a sheet; with the segments in their order, where there is one."""
    if "order" not in batch:
        return sheet({"image": batch["image"]})
    return sheet({"image, order": _ordered(batch["image"], batch["order"], shape)})


def _ordered(pictures, orders, shape) -> np.ndarray:
    return np.stack([ordered(*pair, shape) for pair in zip(pictures, orders, strict=True)])
