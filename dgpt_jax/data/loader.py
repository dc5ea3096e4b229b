"""From examples to batches: the batch is a function of (seed, step).

Global batch k is positions k·B … (k+1)·B - 1 of the stream, and a process reads just the rows that
its devices hold. So nothing here is ever checkpointed.

While a process trains on R rows of e bytes each (413 kB, of a 224² picture and 257 × 1024 int8), it
holds at most

    max(config.data.prefetch_bytes, 2·R·e)  that is prefetched, of all workers together
    + R·e                                   the batch that is being filled
    + 4·R·e                                 on devices, of a CPU the same memory: 2 in `ahead`, and
                                            those of the steps in flight (loop.py) or on their way
    + a chunk, twice, for each thread       that it reads and stacks; and a decoded picture

and what malloc keeps of what was freed (open_files.keep_memory).
"""

import contextlib
import itertools
import math
import signal
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import grain
import numpy as np

from dgpt_jax import bad_records, orders, records
from dgpt_jax.config import Data
from dgpt_jax.pipeline import Examples

REPLACED = "replaced"  # of a batch: whether an example stands in for one that is bad
# Neighbouring examples that a thread reads and stacks at a time, at most. One by one, the thread
# that fills the batch waits for the interpreter's lock at each: 0.7 times as fast, and from worker
# processes, each with messages and shared memory of its own, 0.5 times.
CHUNK = 64
# Examples that are prefetched at most, however small they are.
MOST_PREFETCHED = 4096
# Chunks of a worker beside its own buffer: in shared memory, in the queue between the processes,
# and in the hands and the queue of the thread that waits for the worker here.
WORKER_CHUNKS = 4


@dataclass(frozen=True)
class _Local:
    """Example i of the stream of one process, which holds `rows` of every global batch."""

    examples: Examples
    order: orders.Shuffled | orders.Lanes
    batch_size: int
    rows: np.ndarray

    def __call__(self, i: int) -> dict[str, np.ndarray]:
        step, row = divmod(int(i), len(self.rows))
        position = step * self.batch_size + int(self.rows[row])
        epoch, index = self.order(position)
        example, replaced = self.examples.read(position, index, epoch)
        return example | {REPLACED: np.bool_(replaced)}


def train_batches(
    examples: Examples, batch_size: int, *, rows: np.ndarray, start_step: int
) -> Generator[dict[str, np.ndarray], None, None]:
    """This process's `rows` (int) of global batches from `start_step` on, endlessly. Close it.

    Raises UserError where the shards of a far store do not fit the cache, or cannot be fetched.
    """
    stream = _Local(examples, _order(examples, batch_size), batch_size, rows)
    batches = _batches(stream, start_step)
    if isinstance(stream.order, orders.Shuffled):
        return batches
    return _fetching(batches, stream, start_step)


def batch_ids(examples: Examples, batch_size: int, *, rows: np.ndarray, step: int) -> list[str]:
    """SPLIT/ID of the examples in this process's `rows` of a global batch."""
    order = _order(examples, batch_size)
    names = []
    for row in rows:
        epoch, index = order(step * batch_size + int(row))
        split = examples.sources.splits[epoch % len(examples.sources.splits)]
        name, _ = examples.policy.first_good(partial(_good_id, split), index)
        names.append(f"{split.split}/{name}")
    return names


def _good_id(source: records.Split, index: int) -> str:
    record = source[index]
    bad_records.picture(source, index, record)
    return record["id"]


def _order(examples: Examples, batch_size: int) -> orders.Shuffled | orders.Lanes:
    if examples.sources.splits[0].cache is None:
        return orders.Shuffled(len(examples), examples.seed)
    return _lanes(examples, batch_size)


def _batches(stream: _Local, start_step: int) -> Generator:
    local, data = len(stream.rows), stream.examples.data
    stop = sys.maxsize // stream.batch_size // local * local
    first = stream(start_step * local)
    prefetch = _prefetch(stream, sum(x.nbytes for x in first.values()))
    chunk = _chunk(local, prefetch, data)
    prefetch //= chunk
    if data.workers:
        _allow_workers()
        prefetch = max(1, prefetch // data.workers - WORKER_CHUNKS)
    chunks = grain.MapDataset.range(start_step * local, stop).map(stream).batch(chunk)
    chunks = chunks.to_iter_dataset(grain.ReadOptions(min(data.threads, prefetch), prefetch))
    # It deals the chunks out to the workers, and takes them back, by turns: their order stays.
    chunks = iter(
        chunks.mp_prefetch(grain.MultiprocessingOptions(data.workers), worker_init_fn=_outlive)
    )
    try:
        while True:
            batch = next(chunks) if chunk == local else _filled(chunks, first, local)
            stream.examples.policy.count(batch.pop(REPLACED))
            stream.examples.check(batch)
            yield batch
            del batch  # or it stays while the next is filled
    finally:
        chunks.close()  # or its threads and processes complain at interpreter exit


def _outlive(index: int, count: int):
    """Makes a worker process ignore the signals that stop a training: terminals and schedulers send
    them to all processes, and the training needs its workers until it has saved. It ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _prefetch(stream: _Local, example_bytes: int) -> int:
    """Number of examples that all threads and workers read before they are asked for."""
    local = len(stream.rows)
    most = min(MOST_PREFETCHED, stream.order.prefetch_steps * local)
    return max(2 * local, min(stream.examples.data.prefetch_bytes // example_bytes, most))


def _chunk(local: int, prefetch: int, data: Data) -> int:
    """Examples of a chunk: a power of two that divides a batch, so that what is prefetched has a
    chunk for every thread."""
    most = prefetch // (max(data.workers, 1) * (data.threads + WORKER_CHUNKS))
    return math.gcd(local, 1 << min(CHUNK, max(most, 1)).bit_length() - 1)


def _filled(chunks: Iterator, example: dict, local: int) -> dict[str, np.ndarray]:
    """The next `local` rows, each like this example. Chunks go as soon as they are copied, so that
    a batch is never there twice."""
    batch, row = _empty(local, example), 0
    while row < local:
        chunk = next(chunks)
        rows = slice(row, row + len(chunk[REPLACED]))
        for name, x in chunk.items():
            batch[name][rows] = x
        row = rows.stop
    return batch


def _empty(rows: int, example: dict) -> dict[str, np.ndarray]:
    """A batch to be filled with examples like this one."""
    return {name: np.empty((rows, *x.shape), x.dtype) for name, x in example.items()}


def _lanes(examples: Examples, batch_size: int) -> orders.Lanes:
    lengths = [[shard.take for shard in split.shards] for split in examples.sources.splits]
    data = examples.data
    lanes = data.lanes or math.gcd(orders.LANES, batch_size)
    return orders.Lanes(lengths, batch_size, lanes, data.window, examples.seed)


def _fetching(batches: Generator, stream: _Local, start_step: int) -> Generator:
    """The batches, with the shards of the lanes' present and next windows fetched before them."""
    splits, order = stream.examples.sources.splits, stream.order
    lanes = order.lanes_of(stream.rows)
    cache, files = splits[0].cache, [shard for split in splits for shard in split.shards]
    most, largest = len(lanes) * order.most_shards, max(shard.bytes for shard in files)
    most = min(most, len(files))
    cache.refuse_unless_it_fits(most, largest, f"{most} shards of {len(lanes)} lanes")
    windows = None
    try:
        for step in itertools.count(start_step):
            if windows != (windows := order.current(step, lanes)):
                cache.keep(splits[e % len(splits)].shards[s] for e, s in order.ahead(windows))
            yield next(batches)
    finally:
        batches.close()
        cache.stop()


def _allow_workers():
    """grain asks absl's flags about its workers, also where absl did not start the program."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def eval_batches(
    load: Callable[[int], dict[str, np.ndarray]],
    length: int,
    batch_size: int,
    *,
    rows: np.ndarray,
    threads: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Every example once, in order; bool `valid` is False on what pads the last batch. `rows` (int)
    are those of the global batches that this process holds; `threads` load at a time, None: as many
    as ThreadPoolExecutor has by itself. One batch is there at a time, and what its user keeps."""
    example = load(int(min(rows[0], length - 1)))
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, length, batch_size):
            indices = start + rows
            loaded = _loaded(pool, load, np.minimum(indices, length - 1), example)
            yield loaded | {"valid": indices < length}
            del loaded


def _loaded(pool: ThreadPoolExecutor, load: Callable, indices, example: dict) -> dict:
    """A batch of examples like this one; the threads of the pool put each into its row."""
    batch = _empty(len(indices), example)

    def put(row: int, index: int):
        for name, x in load(index).items():
            batch[name][row] = x

    list(pool.map(put, range(len(indices)), indices))  # raises what a thread has raised
    return batch


def ahead(batches: Generator, place: Callable, depth: int = 2) -> Generator:
    """`place` (host to device, asynchronous) applied `depth` batches before they are used."""
    queue: deque = deque()
    with contextlib.closing(batches):
        for placed in map(place, batches):
            queue.append(placed)
            if len(queue) > depth:
                yield queue.popleft()
        yield from queue
