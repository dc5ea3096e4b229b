"""Progress of an embedding: the complete shards, on disk, and the line that is shown."""

import dataclasses
import json
import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from dgpt_jax.errors import UserError, counted, one_line
from dgpt_jax.evals.embedding.feature_outputs import disk_errors
from dgpt_jax.evals.embedding.image_sources import DATASET, Source
from dgpt_jax.monitoring.progress import Clock, Progress, duration
from dgpt_jax.storage import atomic

FILE = ".progress.jsonl"
SAY_EVERY = 10  # seconds


@dataclass(frozen=True)
class Done:
    """A complete shard: its rows, the sizes of its files after it, and its unreadable images."""

    split: str
    number: int
    rows: int
    files: dict[str, int]
    unreadable: list[str]


def read(directory: Path) -> list[Done]:
    """Returns the complete shards, in the order in which they were written. Raises UserError if the
    file is damaged; a last line without its end was being written."""
    path = directory / FILE
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    try:
        return [Done(**json.loads(line)) for line in lines]
    except (ValueError, TypeError) as e:
        raise UserError(
            f"{path} is damaged: {one_line(e)}: delete {directory} and run the command again"
        ) from None


def write(directory: Path, done: Iterable[Done]) -> None:
    """Replaces the file. Raises UserError."""
    atomic.write_text(directory / FILE, "".join(map(_line, done)))


def append(directory: Path, done: Done) -> None:
    """Records a complete shard. Raises UserError."""
    path = directory / FILE
    with disk_errors(path), path.open("a") as file:
        file.write(_line(done))
        file.flush()
        os.fsync(file.fileno())


def remove(directory: Path) -> None:
    """Removes the file of a finished embedding."""
    (directory / FILE).unlink(missing_ok=True)


def _line(done: Done) -> str:
    return json.dumps(dataclasses.asdict(done)) + "\n"


def check_unreadable(source: Source, done: Iterable[Done], max_fraction: float) -> None:
    """Raises UserError if too many images of a dataset are unreadable."""
    if source.kind != DATASET:
        return
    entries = list(done)
    for split, images in source.splits.items():
        bad = [line for d in entries if d.split == split for line in d.unreadable]
        if len(bad) > max_fraction * len(images):
            raise UserError(
                f"{source.path}: {counted(len(bad), 'unreadable image')} in split {split} of "
                f"{len(images)}, more than --max_bad_fraction={max_fraction:g}; the first: "
                f"{bad[0]}: fix the dataset, or raise the limit"
            )


class EmbeddingProgress:
    """Shows the progress every SAY_EVERY seconds and after the last image."""

    def __init__(self, total: int, done: Collection[Done], say: Callable[[str], None]):
        """total: number of images. done: the complete shards of earlier commands."""
        self._total = total
        self._bad = sum(len(entry.unreadable) for entry in done)
        self._done = sum(entry.rows for entry in done) + self._bad
        self._clock = Clock(self._done, self._total, 1)
        self._progress = Progress("images", SAY_EVERY, say=say)
        self.close = self._progress.close

    def advance(self, rows: int, unreadable: int):
        self._done, self._bad = self._done + rows + unreadable, self._bad + unreadable
        if self._progress.is_due() or self._done == self._total:
            values = self._clock.read(self._done)
            rate = values.get("images_per_second", 0)
            self._progress.show(
                self._done,
                self._total,
                f"({self._done / self._total:.1%}), {rate:.0f} img/s, {self._bad} "
                f"unreadable so far, eta {duration(values.get('eta_seconds', 0))}",
            )
