"""Writes shards of tokens as a pipeline of images, teacher and disk.

Threads make the images of the next batches (decode, crop and encode them, or read them from a
store); the devices compute two batches and transfer the tokens to the host; another thread
serializes and writes the finished examples, while the checksum of the previous shard is computed.
"""

import contextlib
import queue
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Protocol

import jax
import numpy as np
from etils import epath

from dgpt_jax.data.prefetch import prefetch
from dgpt_jax.data.token_codec import Codec
from dgpt_jax.errors import UserError, counted
from dgpt_jax.storage import array_record_shards
from dgpt_jax.tokens import shard_plan
from dgpt_jax.tokens.shard_plan import ShardPlan
from dgpt_jax.tokens.stage_timer import StageTimer
from dgpt_jax.tokens.teacher import Teacher

PREFETCH = 2  # batches of images ahead of the teacher, and of tokens ahead of the disk
MAX_QUEUED = 512  # examples waiting for the disk
OVERHEAD = 250  # bytes of an example besides image and tokens: names, box, ArrayRecord's chunk


class Viewed(Protocol):
    """An example without its tokens."""

    @property
    def image(self) -> np.ndarray:
        """Pixels for the teacher, uint8 (height, width, 3)."""
        ...

    def example(self, tokens: np.ndarray) -> dict:
        """Returns the example with its tokens, in the format of the shards."""
        ...


# (view, index) to an example without its tokens.
MakeView = Callable[[int, int], Viewed]


def write_missing(
    directory: epath.Path,
    planned: Sequence[ShardPlan],
    make_view: MakeView,
    serialize: Callable[[dict], bytes],
    teacher: Teacher,
    codec: Codec,
    example_bytes: float,
    pool: ThreadPoolExecutor,
    say: Callable[[str], None],
    *,
    check: bool,
    what: str = "",
    remedy: str,
) -> None:
    """Writes this process's share of the planned shards that are missing or damaged.

    what: before the line that counts the complete examples. remedy: for a full disk. Raises
    UserError."""
    todo = shard_plan.unfinished(directory, planned, pool, say, check=check)
    total = sum(len(shard.indices) for shard in planned)
    complete = total - sum(len(shard.indices) for shard in todo)
    say(f"{what}complete: {complete} of {counted(total, 'example')}")
    shard_plan.require_disk_space(directory, example_bytes, todo, say, remedy)
    mine = todo[jax.process_index() :: jax.process_count()]
    write(make_view, serialize, teacher, codec, example_bytes, mine, pool, say)


def write(
    make_view: MakeView,
    serialize: Callable[[dict], bytes],
    teacher: Teacher,
    codec: Codec,
    example_bytes: float,
    todo: Sequence[ShardPlan],
    pool: ThreadPoolExecutor,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Writes the shards `todo` in order. Returns images_per_second and the fractions of time spent
    waiting for images, teacher and disk, after the first batch, which compiles. Raises
    UserError."""
    timer = StageTimer(sum(len(shard.indices) for shard in todo), example_bytes, say)
    views = _view_batches(make_view, teacher.batch_size, todo, pool)
    examples = _encode(views, teacher.encoder(codec), timer)
    with _ShardWriter(serialize) as writer:
        for shard in todo:
            writer.begin(shard)
            for example in islice(examples, len(shard.indices)):
                timer.timed("disk", writer.add, example)
            writer.end()
    return timer.summary()


def _view_batches(make_view, batch_size: int, todo, pool) -> Iterator[list[Viewed]]:
    """Yields batches within each shard, made by the pool PREFETCH batches ahead."""
    batches = (
        [pool.submit(make_view, shard.view, i) for i in shard.indices[start : start + batch_size]]
        for shard in todo
        for start in range(0, len(shard.indices), batch_size)
    )
    for futures in prefetch(batches, PREFETCH):
        yield [future.result() for future in futures]


def _encode(views: Iterator, start: Callable, timer: StageTimer) -> Iterator[dict]:
    """Yields stored examples in order; the teacher runs PREFETCH batches ahead."""
    batches = iter(lambda: timer.timed("images", next, views, None), None)
    in_flight = ((batch, start(np.stack([view.image for view in batch]))) for batch in batches)
    for batch, results in prefetch(in_flight, PREFETCH):
        yield from _fetch_results(batch, results, timer)


def _fetch_results(batch: list[Viewed], results, timer: StageTimer) -> Iterator[dict]:
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
