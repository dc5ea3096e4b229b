"""From examples to batches: the batch is a function of (seed, step).

Global batch k is positions k·B … (k+1)·B - 1 of the stream, and a process reads just the rows that
its devices hold. So nothing here is ever checkpointed.
"""

import contextlib
import itertools
import math
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import grain
import numpy as np

from dgpt_jax import bad_records, orders, records
from dgpt_jax.pipeline import Examples

REPLACED = "replaced"  # of a batch: whether an example stands in for one that is bad


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
    order = _order(examples, batch_size)
    batches = _batches(examples, order, batch_size, rows, start_step)
    if isinstance(order, orders.Shuffled):
        return batches
    return _fetching(batches, examples, order, rows, start_step)


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


def _batches(examples, order, batch_size: int, rows, start_step: int) -> Generator:
    local = len(rows)
    stream = grain.MapDataset.range(sys.maxsize // batch_size // local * local)
    stream = stream.map(_Local(examples, order, batch_size, rows)).batch(local)[start_step:]
    data = examples.data
    options = grain.ReadOptions(
        num_threads=data.threads, prefetch_buffer_size=max(2 * local, data.threads)
    )
    batches = stream.to_iter_dataset(options)
    if data.workers:
        _allow_workers()
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=data.workers))
    iterator = iter(batches)
    try:
        for batch in iterator:
            examples.policy.count(batch.pop(REPLACED))
            yield batch
    finally:
        iterator.close()  # or its threads and processes complain at interpreter exit


def _lanes(examples: Examples, batch_size: int) -> orders.Lanes:
    lengths = [[shard.take for shard in split.shards] for split in examples.sources.splits]
    data = examples.data
    lanes = data.lanes or math.gcd(orders.LANES, batch_size)
    return orders.Lanes(lengths, batch_size, lanes, data.window, examples.seed)


def _fetching(
    batches: Generator, examples: Examples, order: orders.Lanes, rows, start_step: int
) -> Generator:
    """The batches, with the shards of the lanes' present and next windows fetched before them."""
    splits, lanes = examples.sources.splits, order.lanes_of(rows)
    cache, most = splits[0].cache, len(lanes) * order.most_shards
    largest = max(shard.bytes for split in splits for shard in split.shards)
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
    threads: int = 8,
) -> Iterator[dict[str, np.ndarray]]:
    """Every example once, in order; bool `valid` is False on what pads the last batch. `rows` (int)
    are those of the global batches that this process holds."""
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, length, batch_size):
            wanted = start + rows
            loaded = list(pool.map(load, np.minimum(wanted, length - 1)))
            batch = {key: np.stack([example[key] for example in loaded]) for key in loaded[0]}
            yield batch | {"valid": wanted < length}


def ahead(batches: Generator, place: Callable, depth: int = 2) -> Generator:
    """`place` (host to device, asynchronous) applied `depth` batches before they are used."""
    queue: deque = deque()
    with contextlib.closing(batches):
        for batch in batches:
            queue.append(place(batch))
            if len(queue) > depth:
                yield queue.popleft()
        yield from queue
