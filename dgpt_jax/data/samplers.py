"""Samplers: the order in which examples are read, a function of (seed, position of the stream).

Local datasets are shuffled globally, one permutation of all examples per epoch. Remote datasets are
fetched shard by shard, and a global shuffle would make every host fetch every shard in every epoch.
There, the rows of the global batch are divided into lanes, and a lane reads its own range of the
shards, one window of shards after the other.
"""

import functools
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import grain
import numpy as np

from dgpt_jax.errors import UserError

# Streams of random numbers that depend on a position: numpy seeds are (seed, stream, position).
SHARDS, WINDOW = 2, 3
# Default number of lanes: enough to mix, few enough that their windows fit a disk.
LANES = 16
# Minimum number of steps of a remote dataset that are prefetched, however small the shards are.
MIN_PREFETCH_STEPS = 2


class GlobalShuffleSampler:
    """A new permutation of all `length` examples every epoch."""

    prefetch_steps = sys.maxsize  # local shards need not be fetched before they are read

    def __init__(self, length: int, seed: int):
        self._length = length
        self._indices = grain.MapDataset.range(length).seed(seed).shuffle().repeat(None)

    def __call__(self, position: int) -> tuple[int, int]:
        """Returns (epoch, index) of the example at a position."""
        index = self._indices[position]
        assert index is not None  # only filtered datasets have gaps
        return position // self._length, index


@dataclass(frozen=True)
class EpochLayout:
    """The shards of an epoch, concatenated in the epoch's order.

    shards: shard numbers, in order. ends: offset after each of them, in examples. starts: first
    example of every shard in the dataset, by shard number.
    """

    shards: np.ndarray
    ends: np.ndarray
    starts: np.ndarray

    def rank_at(self, offset: int) -> int:
        """Returns the rank in `shards` of the shard that holds an offset."""
        return int(np.searchsorted(self.ends, offset, side="right"))


@dataclass(frozen=True)
class Window:
    """Part of a lane: ranks of its shards in the epoch's order, and its range of offsets."""

    shards: range
    start: int
    stop: int


class ShardWindowSampler:
    """Shards are permuted by (seed, epoch) and concatenated; lane i reads the offsets from
    i · lane_length to (i + 1) · lane_length. It reads them in windows of `window` whole shards,
    each shuffled by (seed, epoch, lane, window). Row r of a batch of B belongs to lane
    r · lanes // B.

    An epoch drops the remainder of the examples divided by the lanes: different ones each time.

    `prefetch_steps`: number of steps that may be prefetched, half a shard per lane and at least
    MIN_PREFETCH_STEPS. `shards_to_fetch` covers all that they read.
    """

    def __init__(
        self, lengths: Sequence[Sequence[int]], batch_size: int, lanes: int, window: int, seed: int
    ):
        """lengths: records of every shard, per view; epoch e reads view e mod K."""
        self._lengths = [np.asarray(view, np.int64) for view in lengths]
        self._batch_size, self._lanes, self._window, self._seed = batch_size, lanes, window, seed
        self.lane_length = int(self._lengths[0].sum()) // lanes
        if not self.lane_length:
            raise UserError(f"config.data.lanes={lanes}: there are fewer examples than lanes")
        self._rows = batch_size // lanes
        half = int(self._lengths[0].mean()) // 2
        self.prefetch_steps = max(MIN_PREFETCH_STEPS, half // self._rows - 1)
        self._layout = functools.lru_cache(4)(self._epoch_layout)
        self._permutation = functools.lru_cache(4 * lanes)(self._window_permutation)

    def __call__(self, position: int) -> tuple[int, int]:
        """Returns (epoch, index) of the example at a position."""
        step, row = divmod(position, self._batch_size)
        lane, row = divmod(row, self._rows)
        epoch, offset = divmod(step * self._rows + row, self.lane_length)
        number, window = self._locate(epoch, lane, offset)
        permutation = self._permutation(epoch, lane, number, window.stop - window.start)
        shuffled = int(permutation[lane * self.lane_length + offset - window.start])
        offset = window.start + shuffled
        layout = self._layout(epoch)
        rank = layout.rank_at(offset)
        shard = layout.shards[rank]
        length = int(self._lengths[epoch % len(self._lengths)][shard])
        return epoch, int(layout.starts[shard]) + offset - (int(layout.ends[rank]) - length)

    def lanes_of(self, rows: Iterable[int]) -> list[int]:
        """Returns the lanes that rows of the global batch belong to."""
        return sorted({int(row) * self._lanes // self._batch_size for row in rows})

    def current_windows(self, step: int, lanes: Sequence[int]) -> list[tuple[int, int, int]]:
        """Returns (epoch, lane, number) of the window that each lane reads from at a step."""
        epoch, offset = divmod(step * self._rows, self.lane_length)
        return [(epoch, lane, self._locate(epoch, lane, offset)[0]) for lane in lanes]

    def shards_to_fetch(self, current: Sequence[tuple[int, int, int]]) -> list[tuple[int, int]]:
        """Returns (epoch, shard) of the current windows, then of the windows that follow: per lane,
        at least `window` shards and the records of a step and of the prefetched steps."""
        now, later = [], []
        for epoch, lane, number in current:
            shards, records = self._window, self._records_ahead
            now += self._shards_in(epoch, self._window_at(epoch, lane, number))
            while shards > 0 or records > 0:
                epoch, number, window = self._next_window(epoch, lane, number)
                later += self._shards_in(epoch, window)
                shards -= len(window.shards)
                records -= window.stop - window.start
        return list(dict.fromkeys(now + later))

    @property
    def max_shards_per_lane(self) -> int:
        """Upper bound of the shards that `shards_to_fetch` returns per lane."""
        lengths, records = np.sort(np.concatenate(self._lengths)), self._records_ahead
        # Whole shards that may follow without holding the records; and partial shards, one at the
        # end and one at the start of each epoch's range of the lane that may end among them.
        too_few = int(np.searchsorted(np.cumsum(lengths), records))
        partial = 2 * (1 + records // self.lane_length)
        if too_few + 1 < self._window and self.lane_length >= lengths[-self._window :].sum():
            return 3 * self._window - 1  # the first window of a lane alone has more whole shards
        return 2 * self._window + too_few + partial

    @property
    def _records_ahead(self) -> int:
        """Records of a lane from the beginning of a step to the end of prefetching."""
        return (1 + self.prefetch_steps) * self._rows

    def _epoch_layout(self, epoch: int) -> EpochLayout:
        lengths = self._lengths[epoch % len(self._lengths)]
        rng = np.random.default_rng((self._seed, SHARDS, epoch))
        shards = rng.permutation(len(lengths))
        return EpochLayout(shards, np.cumsum(lengths[shards]), np.cumsum(lengths) - lengths)

    def _window_permutation(self, epoch: int, lane: int, number: int, length: int) -> np.ndarray:
        rng = np.random.default_rng((self._seed, WINDOW, epoch, lane, number))
        return rng.permutation(length).astype(np.int32)

    def _locate(self, epoch: int, lane: int, offset: int) -> tuple[int, Window]:
        """Returns (number, window) of the window at an offset within a lane."""
        layout, start = self._layout(epoch), lane * self.lane_length
        number = (layout.rank_at(start + offset) - layout.rank_at(start)) // self._window
        return number, self._window_at(epoch, lane, number)

    def _window_at(self, epoch: int, lane: int, number: int) -> Window:
        layout = self._layout(epoch)
        start, stop = lane * self.lane_length, (lane + 1) * self.lane_length
        first = layout.rank_at(start) + number * self._window
        end = min(first + self._window, layout.rank_at(stop - 1) + 1)
        if number:
            start = int(layout.ends[first - 1])
        return Window(range(first, end), start, min(stop, int(layout.ends[end - 1])))

    def _next_window(self, epoch: int, lane: int, number: int) -> tuple[int, int, Window]:
        """Returns (epoch, number, window) of the window that a lane reads next."""
        if self._window_at(epoch, lane, number).stop < (lane + 1) * self.lane_length:
            return epoch, number + 1, self._window_at(epoch, lane, number + 1)
        return epoch + 1, 0, self._window_at(epoch + 1, lane, 0)

    def _shards_in(self, epoch: int, window: Window) -> list[tuple[int, int]]:
        shards = self._layout(epoch).shards
        return [(epoch, int(shards[rank])) for rank in window.shards]
