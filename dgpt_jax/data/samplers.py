"""The order in which examples are read: a function of (seed, position of the stream).

Near by it is one permutation of all examples an epoch. Far away whole shards are fetched, and with
that order every host would fetch every shard, every epoch: there, rows of the global batch belong
to lanes, and a lane reads a part of the shards, one window of shards after the other.
"""

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import grain
import numpy as np

from dgpt_jax.schema import UserError

# Streams of random numbers that hang on one position: numpy seeds are (seed, stream, position).
SHARDS, WINDOW = 2, 3
# Lanes where the config does not say: enough to mix, few enough that their windows fit a disk.
LANES = 16
# Steps of far examples that may be read before they are asked for, however small the shards are.
MIN_PREFETCH_STEPS = 2


class Shuffled:
    """A new permutation of all `length` examples every epoch."""

    prefetch_steps = sys.maxsize  # near by, nothing need be announced before it is read

    def __init__(self, length: int, seed: int):
        self._length = length
        self._indices = grain.MapDataset.range(length).seed(seed).shuffle().repeat(None)

    def __call__(self, position: int) -> tuple[int, int]:
        """(epoch, index) of the example at a position."""
        return position // self._length, self._indices[position]


@dataclass(frozen=True)
class Layout:
    """The shards of an epoch in their order, laid end to end: numbers of the shards, and where each
    ends; where each starts in the dataset."""

    shards: np.ndarray
    ends: np.ndarray
    starts: np.ndarray

    def at(self, place: int) -> int:
        """Which shard, counted in the epoch's order, holds a place."""
        return int(np.searchsorted(self.ends, place, side="right"))


@dataclass(frozen=True)
class Window:
    """A part of a lane's piece: its shards (counted in the epoch's order), and its places."""

    shards: range
    start: int
    stop: int


class Lanes:
    """Shards are permuted by (seed, epoch) and laid end to end; each of `lanes` equal pieces is a
    lane's. The lane reads it in windows of `window` whole shards, each shuffled by (seed, epoch,
    lane, window). Row r of a batch of B belongs to lane r · lanes // B.

    An epoch leaves out what does not divide by the lanes: other examples each time.

    `prefetch_steps`: how many steps may be read before they are asked for. `ahead` names all that
    they read, with half a shard for a lane, or MIN_PREFETCH_STEPS where shards are smaller.
    """

    def __init__(
        self, lengths: Sequence[Sequence[int]], batch_size: int, lanes: int, window: int, seed: int
    ):
        """lengths: records of every shard, of every view; epoch e reads view e mod K."""
        self._lengths = [np.asarray(view, np.int64) for view in lengths]
        self._batch_size, self._lanes, self._window, self._seed = batch_size, lanes, window, seed
        self.piece = int(self._lengths[0].sum()) // lanes
        if not self.piece:
            raise UserError(f"config.data.lanes is {lanes}, and there are fewer examples")
        self._rows = batch_size // lanes
        half = int(self._lengths[0].mean()) // 2
        self.prefetch_steps = max(MIN_PREFETCH_STEPS, half // self._rows - 1)
        self._layout = functools.lru_cache(4)(self._layout_of)
        self._shuffle = functools.lru_cache(4 * lanes)(self._shuffle_of)

    def __call__(self, position: int) -> tuple[int, int]:
        """(epoch, index) of the example at a position."""
        step, row = divmod(position, self._batch_size)
        lane, row = divmod(row, self._rows)
        epoch, offset = divmod(step * self._rows + row, self.piece)
        number, window = self._locate(epoch, lane, offset)
        shuffled = self._shuffle(epoch, lane, number, window.stop - window.start)
        place = window.start + int(shuffled[lane * self.piece + offset - window.start])
        layout = self._layout(epoch)
        shard = layout.at(place)
        length = int(self._lengths[epoch % len(self._lengths)][layout.shards[shard]])
        within = place - (int(layout.ends[shard]) - length)
        return epoch, int(layout.starts[layout.shards[shard]]) + within

    def lanes_of(self, rows) -> list[int]:
        """The lanes that rows of the global batch belong to."""
        return sorted({int(row) * self._lanes // self._batch_size for row in rows})

    def current(self, step: int, lanes: Sequence[int]) -> list[tuple[int, int, int]]:
        """(epoch, lane, number) of the window that each lane reads from at a step."""
        epoch, offset = divmod(step * self._rows, self.piece)
        return [(epoch, lane, self._locate(epoch, lane, offset)[0]) for lane in lanes]

    def ahead(self, current: Sequence[tuple[int, int, int]]) -> list[tuple[int, int]]:
        """(epoch, shard) of these windows, then of those that follow: of each lane, until there
        are `window` more shards, and the records of a step and of those that are prefetched."""
        now, later = [], []
        for epoch, lane, number in current:
            shards, records = self._window, self._records_ahead
            window = self._numbered(epoch, lane, number)
            now += self._named(epoch, window)
            while shards > 0 or records > 0:
                epoch, number, window = self._after(epoch, lane, number)
                later += self._named(epoch, window)
                shards -= len(window.shards)
                records -= window.stop - window.start
        return list(dict.fromkeys(now + later))

    @property
    def most_shards(self) -> int:
        """The most that `ahead` names for a lane."""
        lengths, records = np.sort(np.concatenate(self._lengths)), self._records_ahead
        # Whole shards that may follow and not hold the records; and parts of shards, one at the end
        # and one at the start of each piece that may end among them.
        too_few = int(np.searchsorted(np.cumsum(lengths), records))
        parts = 2 * (1 + records // self.piece)
        if too_few + 1 < self._window and self.piece >= lengths[-self._window :].sum():
            return 3 * self._window - 1  # a piece's first window alone has more whole shards
        return 2 * self._window + too_few + parts

    @property
    def _records_ahead(self) -> int:
        """Records of a lane from where a step begins to where prefetching ends."""
        return (1 + self.prefetch_steps) * self._rows

    def _layout_of(self, epoch: int) -> Layout:
        lengths = self._lengths[epoch % len(self._lengths)]
        rng = np.random.default_rng((self._seed, SHARDS, epoch))
        shards = rng.permutation(len(lengths))
        return Layout(shards, np.cumsum(lengths[shards]), np.cumsum(lengths) - lengths)

    def _shuffle_of(self, epoch: int, lane: int, number: int, length: int) -> np.ndarray:
        rng = np.random.default_rng((self._seed, WINDOW, epoch, lane, number))
        return rng.permutation(length).astype(np.int32)

    def _locate(self, epoch: int, lane: int, offset: int) -> tuple[int, Window]:
        """(number, window) of an offset in a lane's piece."""
        layout = self._layout(epoch)
        first, here = layout.at(lane * self.piece), layout.at(lane * self.piece + offset)
        number = (here - first) // self._window
        return number, self._numbered(epoch, lane, number)

    def _numbered(self, epoch: int, lane: int, number: int) -> Window:
        layout = self._layout(epoch)
        start, stop = lane * self.piece, (lane + 1) * self.piece
        begin = layout.at(start) + number * self._window
        end = min(begin + self._window, layout.at(stop - 1) + 1)
        if number:
            start = int(layout.ends[begin - 1])
        return Window(range(begin, end), start, min(stop, int(layout.ends[end - 1])))

    def _after(self, epoch: int, lane: int, number: int) -> tuple[int, int, Window]:
        """(epoch, number, window) that a lane reads next."""
        if self._numbered(epoch, lane, number).stop < (lane + 1) * self.piece:
            return epoch, number + 1, self._numbered(epoch, lane, number + 1)
        return epoch + 1, 0, self._numbered(epoch + 1, lane, 0)

    def _named(self, epoch: int, window: Window) -> list[tuple[int, int]]:
        shards = self._layout(epoch).shards
        return [(epoch, int(shards[number])) for number in window.shards]
