"""Writes the shards of a token store as a pipeline of rendering, teacher and disk.

Threads decode, crop and encode the images of the next batches; the devices compute two batches and
transfer the tokens to the host; another thread serializes and writes the finished examples, while
the checksum of the previous shard is computed.
"""

import contextlib
import queue
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from types import SimpleNamespace

import numpy as np
from etils import epath

from dgpt_jax import invocation
from dgpt_jax.config import TokensConfig
from dgpt_jax.data import bad_records, image_ops, token_store, transforms
from dgpt_jax.data.prefetch import prefetch
from dgpt_jax.data.token_codec import Codec
from dgpt_jax.data.token_store import StoreInfo
from dgpt_jax.errors import BadRecord, UserError
from dgpt_jax.storage import array_record_shards, tfds_dataset
from dgpt_jax.tokens.stage_timer import StageTimer
from dgpt_jax.tokens.teacher import Teacher

PREFETCH = 2  # batches rendered ahead of the teacher, and encoded ahead of the disk
MAX_QUEUED = 512  # examples waiting for the disk
OVERHEAD = 250  # bytes of an example besides image and tokens: names, box, ArrayRecord's chunk


@dataclass(frozen=True)
class ShardPlan:
    """One shard of the store: a view of a range of examples."""

    path: epath.Path
    view: int
    indices: range


@dataclass(frozen=True)
class RenderedView:
    """An example without its tokens; `image` is decoded from `encoded`."""

    id: str
    label: int | None
    view: image_ops.View
    encoded: bytes
    image: np.ndarray

    def example(self, tokens: np.ndarray) -> dict:
        """Returns the example with its tokens, in the format of token_store.features."""
        example = {
            "id": self.id,
            "image": self.encoded,
            "tokens": tokens,
            "box": np.asarray(self.view.box, np.int32),
            "flip": np.int32(self.view.flip),
        }
        return example if self.label is None else example | {"label": self.label}


def draw(
    config: TokensConfig | SimpleNamespace, index: int, view: int, height: int, width: int
) -> image_ops.View:
    """Draws view number `view` of example `index`, an image of height×width: a function of these
    and of the config's seed, crop_scale, crop_ratio and flip."""
    return image_ops.draw_view(
        transforms.generator(config.seed, transforms.VIEW, index, view),
        height,
        width,
        scale=config.crop_scale,
        ratio=config.crop_ratio,
        flip=config.flip,
    )


def render(config: TokensConfig, source: tfds_dataset.Split, view: int, index: int) -> RenderedView:
    """Renders a view of an example. Raises UserError if its image cannot be decoded."""
    try:
        record = source[index]
        image = bad_records.decode_image(source, index, record)
    except BadRecord as e:
        raise UserError(
            f"{e}. A store needs all examples of its source: import the images with "
            f"`{invocation.command('import')}`, which skips unreadable files"
        ) from None
    drawn = draw(config, index, view, *image.shape[:2])
    crop = image_ops.render(image, drawn, config.image_size)
    encoded = image_ops.encode_image(crop, config.image_encoding)
    decoded = image_ops.decode_image(encoded)
    return RenderedView(record["id"], record.get("label"), drawn, encoded, decoded)


def write(
    config: TokensConfig,
    source: tfds_dataset.Split,
    teacher: Teacher,
    info: StoreInfo,
    codec: Codec,
    todo: Sequence[ShardPlan],
    pool: ThreadPoolExecutor,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Writes the shards `todo` in order. Returns images_per_second and the fractions of time spent
    waiting for images, teacher and disk, after the first batch, which compiles. Raises
    UserError."""
    serialize = tfds_dataset.serializer(token_store.features(info, source.label))
    timer = StageTimer(sum(len(shard.indices) for shard in todo), info.example_bytes, say)
    rendered = _render_batches(config, source, teacher.batch_size, todo, pool)
    examples = _encode(rendered, teacher.encoder(codec), timer)
    with _ShardWriter(serialize) as writer:
        for shard in todo:
            writer.begin(shard)
            for example in islice(examples, len(shard.indices)):
                timer.timed("disk", writer.add, example)
            writer.end()
    return timer.summary()


def _render_batches(config, source, batch_size: int, todo, pool) -> Iterator[list[RenderedView]]:
    """Yields batches within each shard, rendered by the pool PREFETCH batches ahead."""
    batches = (
        [
            pool.submit(render, config, source, shard.view, i)
            for i in shard.indices[start : start + batch_size]
        ]
        for shard in todo
        for start in range(0, len(shard.indices), batch_size)
    )
    for futures in prefetch(batches, PREFETCH):
        yield [future.result() for future in futures]


def _encode(rendered: Iterator, start: Callable, timer: StageTimer) -> Iterator[dict]:
    """Yields stored examples in order; the teacher runs PREFETCH batches ahead."""
    batches = iter(lambda: timer.timed("images", next, rendered, None), None)
    in_flight = ((batch, start(np.stack([view.image for view in batch]))) for batch in batches)
    for batch, results in prefetch(in_flight, PREFETCH):
        yield from _fetch_results(batch, results, timer)


def _fetch_results(batch: list[RenderedView], results, timer: StageTimer) -> Iterator[dict]:
    tokens, finite = timer.timed("teacher", lambda: [np.asarray(result) for result in results])
    require_finite(finite)
    timer.done(len(batch))
    for view, stored in zip(batch, tokens[: len(batch)], strict=True):
        yield view.example(stored)


def require_finite(finite: bool | np.bool_):
    """Raises UserError if the teacher's tokens are not all finite."""
    if not finite:
        raise UserError(
            "the teacher's tokens are not finite: check config.teacher.weights and its dtype"
        )


class _ShardWriter:
    """Writes shards in two threads, in order: one is written while the previous one is completed.

    A context manager; `add`, `end` and the exit raise the errors of the threads. On an exception,
    unfinished shards are discarded.
    """

    def __init__(self, serialize: Callable[[dict], bytes]):
        self._serialize = serialize
        self._threads = ThreadPoolExecutor(2)
        self._writing: deque[Future] = deque()
        self._queue: queue.Queue = queue.Queue(MAX_QUEUED)

    def begin(self, shard: ShardPlan):
        self._queue = queue.Queue(MAX_QUEUED)
        while len(self._writing) > 1:
            self._writing.popleft().result()
        records = map(self._serialize, self._drain(self._queue))
        self._writing.append(self._threads.submit(array_record_shards.write, shard.path, records))

    @staticmethod
    def _drain(items: queue.Queue) -> Iterator[dict]:
        while (item := items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def add(self, example: dict | None):
        while True:
            try:
                return self._queue.put(example, timeout=1)
            except queue.Full:
                if self._writing[-1].done():  # it has failed, and the queue stays full
                    self._writing[-1].result()

    def end(self):
        self.add(None)

    def __enter__(self) -> "_ShardWriter":
        return self

    def __exit__(self, kind, error, _):
        if error is not None:
            with contextlib.suppress(queue.Empty):
                while True:
                    self._queue.get_nowait()
            self._queue.put(InterruptedError("the shard was abandoned"))
            self._threads.shutdown()
            return
        for writing in self._writing:
            writing.result()
        self._threads.shutdown()
