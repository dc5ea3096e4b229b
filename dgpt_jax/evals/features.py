"""Extracts the features of a model for every image of a dataset, into sharded banks."""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dgpt_jax.data import bad_records, dataset, image_ops, loader
from dgpt_jax.distributed import sharding
from dgpt_jax.errors import UserError
from dgpt_jax.evals.feature_bank import FeatureBank, bank_steps, refuse_not_finite
from dgpt_jax.storage import tfds_dataset


class ImageSource(Protocol):
    """A dataset to evaluate on; str() gives its name.

    classes: number of classes if every example has exactly one label, else None.
    """

    classes: int | None

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """RGB uint8 (height, width, 3) and int32 label or labels, of the same shape for all."""
        ...


class RecordSource:
    """Labelled examples of a TFDS split. Raises UserError on a dataset without labels."""

    def __init__(self, split: tfds_dataset.Split):
        if split.label is None:
            raise UserError(f"{split} has no labels")
        dataset.check_first_label(split)
        self._split, self.classes = split, split.label.num_classes

    def __len__(self) -> int:
        return len(self._split)

    def __str__(self) -> str:
        return str(self._split)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        record = self._split[index]
        image = bad_records.decode_image(self._split, index, record)
        return image, np.asarray(record["label"], np.int32)


class Extractor:
    """Computes {name: FeatureBank} of a dataset; see __call__.

    encode(params, images), jittable, maps uint8 (B, size, size, 3) to {name: (B, …)}; it is
    compiled once. max_examples: only the first of them. Each process reads its own rows of every
    batch. Hosts hold labels and the batches in flight, devices their shards of the rows.
    """

    def __init__(
        self,
        encode: Callable[[Any, jax.Array], Any],
        mesh: jax.sharding.Mesh,
        *,
        batch_size: int,
        max_examples: int | None = None,
        threads: int | None = None,
    ):
        self._mesh, self._batch_size, self._max_examples = mesh, batch_size, max_examples
        self._threads = threads
        self._rows = sharding.process_rows(mesh, batch_size)
        replicated = sharding.replicated(mesh)

        def run(params, batch):
            features = encode(params, batch["image"])
            bad = jax.tree.map(lambda x: (~_finite(x) & batch["valid"]).sum(), features)
            return features, batch["label"], bad

        shardings = (sharding.batch_sharding(mesh), replicated, replicated)
        self._encode = jax.jit(run, out_shardings=shardings)

    def __call__(
        self, params: Any, source: ImageSource, view: Callable[[np.ndarray], np.ndarray]
    ) -> dict[str, FeatureBank]:
        """Banks of a source; `view` turns an image into the model's input.

        Raises UserError on features that are not finite and on labels out of range.
        """

        def load(index):
            image, label = source.read(index)
            return {"image": view(image), "label": label}

        rows, labels, in_flight = None, [], deque()
        length = min(len(source), self._max_examples or len(source))
        batches = loader.eval_batches(
            load, length, self._batch_size, rows=self._rows, threads=self._threads
        )
        counts = None
        for step, local in enumerate(batches):
            if source.classes is not None:
                dataset.check_labels(local["label"][local["valid"]], source, source.classes)
            batch = sharding.global_batch(self._mesh, self._batch_size, local)
            features, label, bad = self._encode(params, batch)
            if rows is None:
                rows = self._allocate(features, length)
            rows = _write_step(rows, features, step)
            counts = bad if counts is None else jax.tree.map(jnp.add, counts, bad)
            in_flight.append(label)
            if len(in_flight) > 1:  # one step late, so that host and devices overlap
                labels.append(np.asarray(in_flight.popleft()))
        labels = np.concatenate([*labels, *map(np.asarray, in_flight)])[:length]
        for name, count in (counts or {}).items():
            refuse_not_finite(int(count), length, f"{source}: {name} features")
        return {name: FeatureBank(x, labels) for name, x in (rows or {}).items()}

    def _allocate(self, features: dict[str, jax.Array], length: int) -> dict[str, jax.Array]:
        steps = bank_steps(length, self._batch_size, self._mesh)
        return _zeros(features, steps, sharding.microbatch_sharding(self._mesh))


@partial(jax.jit, static_argnums=(1, 2))
def _zeros(features, steps, out_sharding):
    """Zeroed buffers (steps, B, …) for `steps` batches of features."""
    zeros = jax.tree.map(lambda x: jnp.zeros((steps, *x.shape), x.dtype), features)
    return jax.lax.with_sharding_constraint(zeros, out_sharding)


@partial(jax.jit, donate_argnums=0)
def _write_step(buffers, features, step):
    return jax.tree.map(
        lambda b, x: jax.lax.dynamic_update_index_in_dim(b, x, step, 0), buffers, features
    )


def _finite(rows):
    """bool (B,): True for rows (B, …) that are finite."""
    return jnp.isfinite(rows).all(axis=tuple(range(1, rows.ndim)))


def center_view(size: int, resize: int, squash: bool) -> Callable[[np.ndarray], np.ndarray]:
    """Resize and center crop (image_ops.center_crop) to `size` pixels. Raises UserError on a
    smaller `resize`."""
    if resize < size:
        raise UserError(
            f"resizing to {resize} pixels is too small for a model of {size}: set config.resize "
            f"(config.evals.knn_resize in training) to {size} or more"
        )
    return partial(image_ops.center_crop, resize_to=resize, size=size, squash=squash)
