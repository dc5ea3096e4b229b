"""Data loader: examples to batches, a function of (seed, step).

Global batch k is positions k·B … (k+1)·B - 1 of the stream, and a process reads only the rows that
its devices hold. No loader state is checkpointed.

A process that trains on R rows of e bytes each (413 kB for a 224² image and 257 × 1024 int8) holds
at most

    max(config.data.prefetch_bytes, 2·R·e)  prefetched examples, of all workers together
    + R·e                                   the batch that is being filled
    + 4·R·e                                 on devices (CPUs: in host memory): 2 prefetched,
                                            and those of steps in flight or in transfer
    + 2 chunks per thread                   being read and stacked, and one decoded image

and the freed memory that malloc retains (file_limits.tune_malloc).
"""

import contextlib
import math
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import grain
import numpy as np

from dgpt_jax.config import DataConfig
from dgpt_jax.data import bad_records, samplers
from dgpt_jax.data.dataset import ExampleDataset
from dgpt_jax.data.prefetch import prefetch
from dgpt_jax.data.shard_prefetch import fetch_shards_ahead
from dgpt_jax.storage import tfds_dataset

REPLACED = "replaced"  # batch key: True for examples that replace a bad one
# Maximum number of consecutive examples that a thread reads and stacks at a time. One by one, the
# thread that fills the batch would wait for the GIL at each: 0.7 times as fast, and 0.5 times with
# worker processes, which send a message and a block of shared memory for each.
CHUNK = 64
# Maximum number of prefetched examples, however small they are.
MAX_PREFETCHED = 4096
# Chunks of a worker outside its own buffer: in shared memory, in the queue between the processes,
# and two in the thread of this process that receives from the worker.
WORKER_CHUNKS = 4

Sampler = samplers.GlobalShuffleSampler | samplers.ShardWindowSampler


@dataclass(frozen=True)
class _LocalExamples:
    """Example i of the stream of one process, which holds `rows` of every global batch."""

    examples: ExampleDataset
    sampler: Sampler
    batch_size: int
    rows: np.ndarray

    def __call__(self, i: int) -> dict[str, np.ndarray]:
        step, row = divmod(int(i), len(self.rows))
        position = step * self.batch_size + int(self.rows[row])
        epoch, index = self.sampler(position)
        example, replaced = self.examples.read(position, index, epoch)
        return example | {REPLACED: np.array(replaced)}


def train_batches(
    examples: ExampleDataset, batch_size: int, *, rows: np.ndarray, start_step: int
) -> Generator[dict[str, np.ndarray], None, None]:
    """Yields this process's `rows` (int) of global batches from `start_step` on, without end; the
    caller closes the generator.

    Raises UserError if shards of a remote store do not fit the cache or cannot be fetched.
    """
    stream = _LocalExamples(examples, _sampler(examples, batch_size), batch_size, rows)
    batches = _batches(stream, start_step)
    if isinstance(stream.sampler, samplers.GlobalShuffleSampler):
        return batches
    return fetch_shards_ahead(
        batches, examples.sources.splits, stream.sampler, rows=rows, start_step=start_step
    )


def batch_ids(
    examples: ExampleDataset, batch_size: int, *, rows: np.ndarray, step: int
) -> list[str]:
    """Returns SPLIT/ID of the examples in this process's `rows` of a global batch."""
    sampler = _sampler(examples, batch_size)
    names = []
    for row in rows:
        epoch, index = sampler(step * batch_size + int(row))
        split = examples.sources.splits[epoch % len(examples.sources.splits)]
        name, _ = examples.policy.load_or_replace(partial(_checked_id, split), index)
        names.append(f"{split.split}/{name}")
    return names


def _checked_id(source: tfds_dataset.Split, index: int) -> str:
    record = source[index]
    bad_records.decode_image(source, index, record)
    return record["id"]


def _sampler(examples: ExampleDataset, batch_size: int) -> Sampler:
    if examples.sources.splits[0].cache is None:
        return samplers.GlobalShuffleSampler(len(examples), examples.seed)
    lengths = [[shard.take for shard in split.shards] for split in examples.sources.splits]
    data = examples.data
    lanes = data.lanes or math.gcd(samplers.LANES, batch_size)
    return samplers.ShardWindowSampler(lengths, batch_size, lanes, data.window, examples.seed)


def _batches(stream: _LocalExamples, start_step: int) -> Generator:
    local, data = len(stream.rows), stream.examples.data
    stop = sys.maxsize // stream.batch_size // local * local
    first = stream(start_step * local)
    prefetched = _prefetched_examples(stream, sum(x.nbytes for x in first.values()))
    chunk = _chunk_size(local, prefetched, data)
    buffer = prefetched // chunk
    if data.workers:
        _mark_flags_parsed()
        buffer = max(1, buffer // data.workers - WORKER_CHUNKS)
    chunks = grain.MapDataset.range(start_step * local, stop).map(stream).batch(chunk)
    chunks = chunks.to_iter_dataset(grain.ReadOptions(min(data.threads, buffer), buffer))
    # Chunks go to the workers and come back round-robin, so their order is preserved.
    workers = grain.MultiprocessingOptions(data.workers)
    chunks = iter(chunks.mp_prefetch(workers, worker_init_fn=_ignore_signals))
    try:
        while True:
            batch = next(chunks) if chunk == local else _fill_chunks(chunks, first, local)
            stream.examples.policy.count(batch.pop(REPLACED))
            stream.examples.check(batch)
            yield batch
            del batch  # or it would stay in memory while the next is filled
    finally:
        chunks.close()  # or its threads and processes print errors at interpreter exit


def _ignore_signals(index: int, count: int):
    """Makes a worker process ignore SIGINT and SIGTERM: terminals and schedulers send them to all
    processes, and training needs its workers until it has saved. It then ends them itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _prefetched_examples(stream: _LocalExamples, example_bytes: int) -> int:
    """Returns the number of examples that all threads and workers prefetch together."""
    local = len(stream.rows)
    most = min(MAX_PREFETCHED, stream.sampler.prefetch_steps * local)
    return max(2 * local, min(stream.examples.data.prefetch_bytes // example_bytes, most))


def _chunk_size(local: int, prefetched: int, data: DataConfig) -> int:
    """Returns the examples per chunk: a power of two that divides a batch and leaves a chunk of the
    prefetched examples for every thread."""
    most = prefetched // (max(data.workers, 1) * (data.threads + WORKER_CHUNKS))
    return math.gcd(local, 1 << min(CHUNK, max(most, 1)).bit_length() - 1)


def _fill_chunks(chunks: Iterator, example: dict, local: int) -> dict[str, np.ndarray]:
    """Returns a batch of the next `local` rows. Each chunk is freed once copied, so that memory
    never holds the batch twice."""
    batch, row = _empty(local, example), 0
    while row < local:
        chunk = next(chunks)
        rows = slice(row, row + len(chunk[REPLACED]))
        for name, x in chunk.items():
            batch[name][rows] = x
        row = rows.stop
    return batch


def _empty(rows: int, example: dict) -> dict[str, np.ndarray]:
    """Allocates a batch of examples shaped like `example`."""
    return {name: np.empty((rows, *x.shape), x.dtype) for name, x in example.items()}


def _mark_flags_parsed():
    """Lets Grain read absl's flags for its workers when absl did not start the program."""
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
    """Yields every example once, in order, with a bool array `valid`: False for rows that pad the
    last batch. Only one batch is in memory, apart from those that the caller keeps.

    rows: rows (int) of the global batches that this process holds. threads: number of threads that
    load examples; None: the default of ThreadPoolExecutor.
    """
    example = load(int(min(rows[0], length - 1)))
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, length, batch_size):
            indices = start + rows
            loaded = _load_all(pool, load, np.minimum(indices, length - 1), example)
            yield loaded | {"valid": indices < length}
            del loaded


def _load_all(
    pool: ThreadPoolExecutor, load: Callable, indices: np.ndarray, example: dict
) -> dict[str, np.ndarray]:
    """Returns a batch of loaded examples; the pool's threads copy each into its row."""
    batch = _empty(len(indices), example)

    def load_row(row: int, index: int):
        for name, x in load(index).items():
            batch[name][row] = x

    list(pool.map(load_row, range(len(indices)), indices))  # raises the errors of the threads
    return batch


def prefetch_to_device(
    batches: Generator, to_device: Callable[[dict], dict], depth: int = 2
) -> Generator:
    """Yields the batches after `to_device` (an asynchronous transfer), `depth` batches ahead."""
    with contextlib.closing(batches):
        yield from prefetch(map(to_device, batches), depth)
