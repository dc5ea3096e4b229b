"""Quality of frozen features without labels: effective rank, and agreement between two views.

Both need only held-out images. They rank checkpoints of one run, and runs on the same images; they
say nothing about which classes the features separate.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from dgpt_jax.data import image_ops
from dgpt_jax.evals import feature_bank, knn
from dgpt_jax.evals.feature_bank import FeatureBank

SCALE, RATIO = (0.3, 0.7), (3 / 4, 4 / 3)  # of the crop that is the second view


class TwoViews:
    """A features.ImageSource of images (size, size, 3) and one random crop of each.

    load(index) returns an example with uint8 "image". The crop is a function of the index. The
    label of an image is its index.
    """

    classes: int | None = None

    def __init__(self, load: Callable[[int], dict[str, Any]], length: int, *, flip: bool):
        """flip: mirror half of the crops."""
        self._load, self._length, self._flip = load, length, flip

    def __len__(self) -> int:
        return self._length

    def __str__(self) -> str:
        return "two views of held-out images"

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the two views, uint8 (2, size, size, 3), and the index."""
        image = self._load(index)["image"]
        size = image.shape[0]
        rng = np.random.default_rng(index)
        view = image_ops.draw_view(rng, size, size, scale=SCALE, ratio=RATIO, flip=self._flip)
        crop = image_ops.render(image, view, size)
        return np.stack([image, crop]), np.asarray(index, np.int32)


def effective_rank(bank: FeatureBank) -> float:
    """Effective rank, 1 to D, of a bank of rows (D,): exp of the entropy of the singular values.

    Source: RankMe (arXiv 2210.02885), on rows that are not centred. The singular values come from
    the D × D matrix of products, summed in float64.
    """
    width = bank.rows.shape[-1]
    products = np.zeros((width, width))
    for rows, _ in bank.local():
        rows = rows.astype(np.float64)
        products += rows.T @ rows
    products = feature_bank.sum_over_processes(products)
    singular = np.sqrt(np.maximum(np.linalg.eigvalsh(products), 0))
    share = singular / max(singular.sum(), np.finfo(np.float64).tiny) + 1e-7
    return float(np.exp(-(share * np.log(share)).sum()))


def view_agreement(queries: FeatureBank, crops: FeatureBank) -> float:
    """Share of `queries` whose most similar row of `crops` (cosine) is the one of the same image.

    Chance is 1 / N. The labels of `queries` are their indices.
    """
    memory = crops.rows, crops.align(np.arange(len(crops), dtype=np.int32), -1)
    hits = 0
    for rows, index in queries.batches():
        _, nearest = knn.nearest_neighbors(rows, memory, 1, crops.mesh)
        hits += int((np.asarray(nearest)[: len(index), 0] == index).sum())
    return hits / len(queries)
