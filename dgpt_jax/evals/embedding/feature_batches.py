"""Features of a source's images, batch by batch: threads decode ahead, devices run two ahead."""

import dataclasses
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dgpt_jax.config import roots
from dgpt_jax.data import image_ops
from dgpt_jax.data.ingest.types import Entry, Images
from dgpt_jax.data.prefetch import prefetch
from dgpt_jax.distributed import sharding
from dgpt_jax.errors import BadRecord, UserError
from dgpt_jax.evals import features
from dgpt_jax.evals.embedding import image_sources
from dgpt_jax.weights.api import PretrainedEncoder
from dgpt_jax.weights.types import Preprocess, resize_edge

PREFETCH = 2  # batches decoded ahead of the devices, and computed ahead of the disk

View = Callable[[np.ndarray], np.ndarray]


class Row(NamedTuple):
    """What an output stores beside the features. label: -1 if there is none."""

    id: str
    label: int
    texts: dict[str, str]


@dataclass(frozen=True)
class Batch:
    """rows: of the readable images. features: one array per row. unreadable: "id: reason" of the
    others."""

    rows: list[Row]
    features: np.ndarray
    unreadable: list[str]


class Loaded(NamedTuple):
    """An image (size, size, 3) and its row; of an unreadable one the reason."""

    row: Row | None
    image: np.ndarray
    reason: str = ""


def preprocessing(encoder: PretrainedEncoder, kind: str) -> tuple[View, dict, tuple[str, ...]]:
    """Returns (decoded image to the encoder's input, its description, notes to print).

    The encoder's own resize and center crop, as evaluations do it; the crops of a token store are
    used as they are, or resized if the encoder takes another size. Raises UserError.
    """
    size, own = encoder.model.image_size, encoder.preprocess
    common = {"crop": size, "mean": list(own.mean), "std": list(own.std)}
    if kind == image_sources.TOKENS:
        view = partial(image_ops.resize, height=size, width=size)
        return view, {"mode": "stored crop", "resize": size, **common}, ()
    edge, notes = max(resize_edge(size, own.crop_pct), size), ()
    mode = "squash" if own.crop_mode == "squash" else "center"
    used = Preprocess(own.mean, own.std, "bicubic", min(own.crop_pct, 1.0), mode)
    if used != own:
        notes = (
            f"{encoder.source} specifies {own.interpolation} resizing, crop mode {own.crop_mode}, "
            f"crop_pct {own.crop_pct:g}: as in evaluations, images are resized to {edge} pixels, "
            f"bicubic, then cropped ({mode})",
        )
    view = features.center_view(size, edge, mode == "squash")
    return view, {"mode": mode, "resize": edge, "filter": "bicubic", **common}, notes


class Encoder:
    """An encoder on all devices of this process: images to one kind of features in one dtype.

    Every device gets `batch_size` images: with another shape, XLA may sum in another order.
    """

    def __init__(self, encoder: PretrainedEncoder, tokens: str, dtype: str, batch_size: int):
        self._mesh = sharding.make_mesh(roots.MeshConfig(), jax.local_devices())
        self.batch_size = batch_size * sharding.batch_shards(self._mesh)
        self.size, self._dtype = encoder.model.image_size, dtype
        self._params = jax.device_put(encoder.params, sharding.replicated(self._mesh))

        def run(params, images):
            model = dataclasses.replace(encoder, params=params)
            exact = model.tokens(images) if tokens == "all" else model.features(images, tokens)
            x = exact.astype(jnp.dtype(dtype))
            return x, jnp.isfinite(x).all(axis=tuple(range(1, x.ndim)))

        self._run = jax.jit(run, out_shardings=sharding.batch_sharding(self._mesh))
        image = jax.ShapeDtypeStruct((1, self.size, self.size, 3), np.uint8)
        self.shape: tuple[int, ...] = jax.eval_shape(run, encoder.params, image)[0].shape[1:]

    def check(self) -> None:
        """Compiles the encoder. Raises UserError if not even features of a black image are
        finite."""
        features, finite = self.start([np.zeros((self.size, self.size, 3), np.uint8)])
        if not np.asarray(finite)[0]:
            raise UserError(_not_finite("a black image", str(features.dtype)))

    def start(self, images: Sequence[np.ndarray]) -> tuple[jax.Array, jax.Array]:
        """Starts a batch of at most `batch_size` images, padded to it. Returns (features, True
        where they are finite), in transfer to the host."""
        padded = np.zeros((self.batch_size, self.size, self.size, 3), np.uint8)
        padded[: len(images)] = images
        batch = jax.device_put(padded, sharding.batch_sharding(self._mesh))
        results = self._run(self._params, batch)
        for result in results:
            result.copy_to_host_async()
        return results


def extract(
    source: image_sources.Source,
    shards: Sequence[Images],
    encoder: Encoder,
    view: View,
    threads: int,
) -> Generator[Batch, None, None]:
    """Yields the batches of all shards in order; none has images of two shards.

    Which images are in a batch depends only on their positions in the shard, so features do not
    depend on where an interrupted command continues. Raises UserError on features that are not
    finite, and on an unreadable image of a token store, whose images are ours.
    """
    load = partial(_load, decode=source.decode, view=view, size=encoder.size)
    with ThreadPoolExecutor(threads) as pool:
        futures = (
            [pool.submit(load, entry) for entry in entries]
            for images in shards
            for entries in _split(images, encoder.batch_size)
        )
        ahead = prefetch(futures, PREFETCH, discard=_cancel)
        loaded = ([future.result() for future in batch] for batch in ahead)
        started = ((batch, encoder.start([x.image for x in batch])) for batch in loaded)
        try:
            for batch, (array, finite) in prefetch(started, PREFETCH):
                yield _finish(source, batch, np.asarray(array), np.asarray(finite))
        finally:
            ahead.close()


def num_batches(images: Images, encoder: Encoder) -> int:
    """Number of batches of a shard."""
    return -(-len(images) // encoder.batch_size)


def _split(images: Images, size: int) -> Iterator[list[Entry]]:
    entries = iter(images)
    while batch := list(itertools.islice(entries, size)):
        yield batch


def _cancel(futures: list[Future]):
    for future in futures:
        future.cancel()


def _load(entry: Entry, decode: Callable[[bytes], np.ndarray], view: View, size: int) -> Loaded:
    try:
        image = view(decode(entry.read()))
        return Loaded(Row(entry.id, entry.label, dict(entry.texts())), image)
    except image_ops.UnreadableImage as e:
        reason = f"{entry.id}: {e}"
    except OSError as e:
        reason = f"{entry.id}: {type(e).__name__}: {e}"
    except BadRecord as e:
        reason = str(e)
    return Loaded(None, np.zeros((size, size, 3), np.uint8), reason)


def _finish(
    source: image_sources.Source, batch: list[Loaded], array: np.ndarray, finite: np.ndarray
) -> Batch:
    rows = [x.row for x in batch if x.row is not None]
    unreadable = [x.reason for x in batch if x.row is None]
    if unreadable and source.kind == image_sources.TOKENS:
        raise UserError(f"{source.path} is damaged: {unreadable[0]}: build the store again")
    for loaded, is_finite in zip(batch, finite):
        if loaded.row is not None and not is_finite:
            where = f"{source.path}: {loaded.row.id}"
            raise UserError(_not_finite(where, str(array.dtype)))
    used = [i for i, x in enumerate(batch) if x.row is not None]
    return Batch(rows, array[used], unreadable)


def _not_finite(image: str, dtype: str) -> str:
    return (
        f"features of {image} are not finite (NaN or Inf): the weights are broken, or their "
        f"features overflow in --dtype={dtype}"
    )
