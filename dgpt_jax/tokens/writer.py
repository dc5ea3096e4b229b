"""Shards of a token store: pictures, teacher and disk at work at the same time.

Threads decode, crop and encode the pictures of the next batches; the devices work on two batches
and send their tokens to the host; another thread serialises and writes what has landed, while the
shard before it gets its checksum.
"""

import contextlib
import math
import queue
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
from etils import epath

from dgpt_jax import bad_records, examples, progress, records, shards, token_store, views
from dgpt_jax.config import Tokens
from dgpt_jax.schema import UserError
from dgpt_jax.teacher import Teacher
from dgpt_jax.token_codec import Codec
from dgpt_jax.token_store import StoreInfo

AHEAD = 2  # batches that are rendered before the teacher asks, and that it is ahead of the disk
QUEUED = 512  # examples on their way to the disk
SAY_SECONDS = 10
OVERHEAD = 250  # bytes of an example beside picture and tokens: names, box, ArrayRecord's chunk


@dataclass(frozen=True)
class Shard:
    """One file of the store: a view of some examples."""

    path: epath.Path
    view: int
    indices: range


@dataclass(frozen=True)
class Rendered:
    """One example on its way into the store."""

    id: str
    label: int | None
    view: views.View
    data: bytes
    picture: np.ndarray

    def example(self, tokens: np.ndarray) -> dict:
        """As token_store.features has it."""
        stored = {
            "id": self.id,
            "image": self.data,
            "tokens": tokens,
            "box": np.asarray(self.view.box, np.int32),
            "flip": np.int32(self.view.flip),
        }
        return stored if self.label is None else stored | {"label": self.label}


def draw(config, index: int, view: int, height: int, width: int) -> views.View:
    """View number `view` of the example `index`, an image of height×width: a function of these and
    of the config's seed, crop_scale, crop_ratio and flip."""
    return views.draw(
        examples.generator(config.seed, examples.VIEW, index, view),
        height,
        width,
        scale=config.crop_scale,
        ratio=config.crop_ratio,
        flip=config.flip,
    )


def render(config: Tokens, source: records.Split, view: int, index: int) -> Rendered:
    """A view of an example as it is stored. Raises UserError where it cannot be decoded."""
    try:
        record = source[index]
        image = bad_records.picture(source, index, record)
    except bad_records.BadRecord as e:
        raise UserError(
            f"{e}. A store has the examples of its source, so none can be left out here: import "
            f"the images with tools/import_images.py, which leaves out unreadable files"
        ) from None
    drawn = draw(config, index, view, *image.shape[:2])
    data = views.encode_picture(views.render(image, drawn, config.picture_size), config.picture)
    return Rendered(record["id"], record.get("label"), drawn, data, views.decode_picture(data))


def write(
    config: Tokens,
    source: records.Split,
    teacher: Teacher,
    info: StoreInfo,
    codec: Codec,
    todo: Sequence[Shard],
    pool: ThreadPoolExecutor,
    say,
) -> dict[str, float]:
    """Writes the shards `todo`, one after the other; images_per_second and the shares of time spent
    waiting for pictures, teacher and disk, without the first batch, which compiles.

    Raises UserError.
    """
    serialize = records.serializer(token_store.features(info, source.label))
    watch = _Watch(sum(len(shard.indices) for shard in todo), info.example_bytes, say)
    rendered = _rendered(config, source, teacher.batch_size, todo, pool)
    examples = _examples(rendered, teacher.encoder(codec), watch)
    with _Writer(serialize) as writer:
        for shard in todo:
            writer.begin(shard)
            for example in islice(examples, len(shard.indices)):
                watch.waits("disk", writer.add, example)
            writer.end()
    return watch.summary()


def _rendered(config, source, batch_size: int, todo, pool) -> Iterator[list[Rendered]]:
    """Batches within each shard, rendered by the pool while the caller is busy with others."""
    ahead: deque = deque()
    for shard in todo:
        for start in range(0, len(shard.indices), batch_size):
            batch = shard.indices[start : start + batch_size]
            ahead.append([pool.submit(render, config, source, shard.view, i) for i in batch])
            if len(ahead) > AHEAD:
                yield [future.result() for future in ahead.popleft()]
    while ahead:
        yield [future.result() for future in ahead.popleft()]


def _examples(rendered: Iterator[list[Rendered]], start, watch: "_Watch") -> Iterator[dict]:
    """Stored examples in order; the teacher is ahead of the caller by AHEAD batches."""
    flying: deque = deque()
    while batch := watch.waits("pictures", next, rendered, None):
        flying.append((batch, start(np.stack([r.picture for r in batch]))))
        if len(flying) > AHEAD:
            yield from _landed(*flying.popleft(), watch)
    while flying:
        yield from _landed(*flying.popleft(), watch)


def _landed(batch: list[Rendered], results, watch: "_Watch") -> Iterator[dict]:
    tokens, finite = watch.waits("teacher", lambda: [np.asarray(result) for result in results])
    refuse_unless(finite)
    watch.done(len(batch))
    for rendered, stored in zip(batch, tokens[: len(batch)], strict=True):
        yield rendered.example(stored)


def refuse_unless(finite):
    """Raises UserError about tokens that are not finite."""
    if not finite:
        raise UserError("the teacher gave tokens that are not finite: check its weights and dtype")


class _Writer:
    """Writes shards in two threads, in order: one is written while the one before is finished.

    A context; what a thread raises, `add`, `end` and the exit raise. Left by an exception, it lets
    no shard come to its end.
    """

    def __init__(self, serialize):
        self._serialize = serialize
        self._threads = ThreadPoolExecutor(2)
        self._writing: deque[Future] = deque()
        self._queue: queue.Queue = queue.Queue(QUEUED)

    def begin(self, shard: Shard):
        self._queue = queue.Queue(QUEUED)
        while len(self._writing) > 1:
            self._writing.popleft().result()
        of_shard = map(self._serialize, self._taken(self._queue))
        self._writing.append(self._threads.submit(shards.write, shard.path, of_shard))

    @staticmethod
    def _taken(items: queue.Queue) -> Iterator[dict]:
        while (item := items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def add(self, example):
        while True:
            try:
                return self._queue.put(example, timeout=1)
            except queue.Full:
                if self._writing[-1].done():  # it has failed: nobody takes anything any more
                    self._writing[-1].result()

    def end(self):
        self.add(None)

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, kind, error, _):
        if error is not None:
            with contextlib.suppress(queue.Empty):
                while True:
                    self._queue.get_nowait()
            self._queue.put(InterruptedError("the shard was given up"))
            self._threads.shutdown()
            return
        for writing in self._writing:
            writing.result()
        self._threads.shutdown()


class _Watch:
    """How far this process is and what it waits for, from the end of the first batch on."""

    def __init__(self, total: int, example_bytes: float, say):
        self._total, self._bytes, self._say = total, example_bytes, say
        self._done = self._first = 0
        self._began = self._said = time.monotonic()
        self._waited = {"pictures": 0.0, "teacher": 0.0, "disk": 0.0}

    def waits(self, what: str, function, *args):
        began = time.monotonic()
        result = function(*args)
        self._waited[what] += time.monotonic() - began
        return result

    def done(self, examples: int):
        self._done += examples
        now = time.monotonic()
        if not self._first:  # what came before was the compile
            self._first, self._began, self._said = examples, now, now
            self._waited = dict.fromkeys(self._waited, 0.0)
        if self._done == self._total or now - self._said > SAY_SECONDS:
            self._said = now
            found = self.summary()
            rate = found.pop("images_per_second")
            left = (self._total - self._done) / rate if rate else math.inf
            self._say(
                f"{self._done}/{self._total} examples ({self._done / self._total:.1%}), "
                f"{self._done * self._bytes / 1e9:.2f} GB, {rate:.0f} img/s, waiting for "
                f"{', '.join(f'{what} {share:.0%}' for what, share in found.items())}, "
                f"eta {progress.duration(left)}"
            )

    def summary(self) -> dict[str, float]:
        elapsed = max(time.monotonic() - self._began, 1e-9)
        shares = {what: seconds / elapsed for what, seconds in self._waited.items()}
        return {"images_per_second": (self._done - self._first) / elapsed} | shares
