"""Frozen features of a labelled image dataset."""

from collections.abc import Callable

import jax
import numpy as np

from dgpt_jax import bad_records, pipeline, records, sharding, views
from dgpt_jax.schema import UserError


class Extractor:
    """(params, source) → (features (N, …) float32, labels (N,)), in order, on every process.

    `encode(params, pictures)` is jittable: uint8 (B, size, size, 3) to (B, …). Pictures are centre
    crops (views.centre_crop). One compile serves all calls. Raises UserError where `resize` is less
    than `size`.
    """

    def __init__(
        self,
        encode: Callable,
        mesh,
        *,
        size: int,
        resize: int,
        squash: bool = False,
        batch_size: int,
    ):
        if resize < size:
            raise UserError(
                f"pictures are resized to {resize} pixels, fewer than the {size} of the model: set "
                f"config.resize (config.evals.knn_resize in training) to {size} or more"
            )
        self._mesh, self._batch_size = mesh, batch_size
        self._rows = sharding.process_rows(mesh, batch_size)
        self._view = {"resize_to": resize, "size": size, "squash": squash}
        self._gather = jax.jit(
            lambda params, batch: (encode(params, batch["image"]), batch["label"], batch["valid"]),
            out_shardings=sharding.replicated(mesh),
        )

    def __call__(self, params, source: records.Split) -> tuple[np.ndarray, np.ndarray]:
        """Raises UserError on a dataset without labels."""
        if source.label is None:
            raise UserError(f"{source} has no labels")

        def load(index):
            record = source[index]
            image = bad_records.picture(source, index, record)
            picture = views.centre_crop(image, **self._view)
            return {"image": picture, "label": np.int32(record["label"])}

        features, labels = [], []
        batches = pipeline.eval_batches(load, len(source), self._batch_size, rows=self._rows)
        for local in batches:
            batch = sharding.global_batch(self._mesh, self._batch_size, local)
            x, y, valid = jax.device_get(self._gather(params, batch))
            features.append(x[valid])
            labels.append(y[valid])
        return np.concatenate(features), np.concatenate(labels)
