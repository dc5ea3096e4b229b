"""Writes the shards of an import: threads decode the images of a shard ahead of the writer."""

import contextlib
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import tensorflow_datasets as tfds
from etils import epath

from dgpt_jax.data import image_ops
from dgpt_jax.data.ingest import user_images
from dgpt_jax.data.ingest.types import Entry, Images
from dgpt_jax.data.prefetch import map_ahead
from dgpt_jax.monitoring.progress import Clock, Progress, duration
from dgpt_jax.storage import array_record_shards, tfds_dataset
from dgpt_jax.storage.array_record_shards import ShardInfo

SAY_EVERY = 10  # seconds
# Notes next to those of unreadable files.
TRANSPARENT = re.compile(r"(\d+) transparent images")
EMPTY = re.compile(r"(\d+) images without (\w+)")


def unreadable(info: ShardInfo) -> list[str]:
    """Returns "id: reason" of the files that were skipped in a shard."""
    notes = (note for note in info.notes if not TRANSPARENT.fullmatch(note))
    return [note for note in notes if not EMPTY.fullmatch(note)]


def transparent(info: ShardInfo) -> int:
    """Returns the number of transparent images in a shard."""
    return sum(int(note[1]) for note in map(TRANSPARENT.fullmatch, info.notes) if note)


def empty_texts(info: ShardInfo) -> Counter:
    """Returns the numbers of images without a text in a shard, {column: count}."""
    return Counter({note[2]: int(note[1]) for note in map(EMPTY.fullmatch, info.notes) if note})


@dataclass(frozen=True)
class Stored:
    """What is stored of an image, besides its id and label."""

    image: user_images.StoredImage
    texts: Mapping[str, str]


def write_missing(
    shards: Mapping[epath.Path, Images],
    infos: Mapping[str, ShardInfo],
    features: tfds.features.FeaturesDict,
    options: user_images.Options,
    threads: int,
    say: Callable[[str], None],
) -> dict[str, ShardInfo]:
    """Writes the shards that `infos` does not name; returns the infos of all."""
    infos, progress = dict(infos), _Progress(shards, infos, say)
    convert = functools.partial(_convert, options=options)
    with contextlib.closing(progress), ThreadPoolExecutor(threads) as pool:
        for path, images in shards.items():
            if path.name not in infos:
                results = map_ahead(pool, convert, images, depth=4 * threads - 1)
                infos[path.name] = _write(path, results, features, progress)
    return infos


class _Progress:
    """Logs the progress of an import every few seconds, and after every shard."""

    def __init__(self, shards: Mapping[epath.Path, Images], infos: Mapping, say: Callable):
        self._total = sum(map(len, shards.values()))
        complete = [path for path in shards if path.name in infos]
        self._done = sum(len(shards[path]) for path in complete)
        self._unreadable = sum(len(unreadable(infos[path.name])) for path in complete)
        self._clock = Clock(self._done, self._total, 1)
        self._progress = Progress("images", SAY_EVERY, say=say)
        self.close = self._progress.close

    def advance(self, is_unreadable: bool):
        self._done += 1
        self._unreadable += is_unreadable
        if self._progress.is_due():
            self.show()

    def show(self):
        values = self._clock.read(self._done)
        self._progress.show(
            self._done,
            self._total,
            f"({self._done / self._total:.1%}), "
            f"{values.get('images_per_second', 0):.0f} img/s, {self._unreadable} unreadable so "
            f"far, eta {duration(values.get('eta_seconds', 0))}",
        )


def _write(
    path: epath.Path, results: Iterable[tuple[Entry, Stored | str]], features, progress
) -> ShardInfo:
    """Writes a shard of images and what to store of each, or the reason why there are no bytes."""
    notes: list[str] = []
    serialize = tfds_dataset.serializer(features)

    def examples() -> Iterator[bytes]:
        transparent, empty = 0, Counter()
        for image, result in results:
            progress.advance(isinstance(result, str))
            if isinstance(result, str):
                notes.append(f"{image.id}: {result}")
                continue
            transparent += result.image.transparent
            empty.update(name for name, value in result.texts.items() if not value)
            example = {**result.texts, "id": image.id, "image": result.image.data}
            if "label" in features:
                example["label"] = image.label
            yield serialize(example)
        if transparent:
            notes.append(f"{transparent} transparent images")
        notes.extend(f"{count} images without {name}" for name, count in sorted(empty.items()))

    info = array_record_shards.write(path, examples(), notes)
    progress.show()
    return info


def _convert(image: Entry, options: user_images.Options) -> Stored | str:
    """Returns what to store, or the reason why there are no bytes."""
    try:
        return Stored(user_images.convert(image.read(), options), image.texts())
    except image_ops.UnreadableImage as e:
        return str(e)
    except OSError as e:
        return f"{type(e).__name__}: {e}"
