"""Imports image collections as TFDS image datasets.

JPEG and PNG bytes are stored unchanged, except that EXIF orientation is applied (training ignores
it), CMYK becomes RGB and transparent images are composited on a background; anything else that
Pillow reads becomes PNG. Images deeper than 8 bits: unsigned integers are scaled by their
container's range; signed integers and floats need --range. Files that Pillow or training's decoder
cannot read are reported, counted and skipped.

An interrupted import resumes when the same command is run again: complete shards are kept, and the
result is identical, byte by byte.
"""

import contextlib
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from etils import epath

from dgpt_jax.data.ingest import discovery, import_settings, shard_writer, user_images
from dgpt_jax.data.ingest.types import Columns, Images
from dgpt_jax.errors import UserError, counted
from dgpt_jax.storage import array_record_shards, disk_space, tfds_dataset
from dgpt_jax.storage.array_record_shards import ShardInfo

SHARD_SIZE = 16384

ShardInfos = dict[str, ShardInfo]  # by file name of the shard
ShardImages = dict[str, dict[epath.Path, Images]]  # of each split, by path of the shard


@dataclass
class Report:
    """Result of an import: examples per split, class names, unreadable files (as "id: reason"),
    number of transparent images, number of images without a text by column, and lines about skipped
    files."""

    examples: dict[str, int] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    transparent: int = 0
    empty_texts: dict[str, int] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)


def import_images(
    src: Path | str,
    out: epath.PathLike,
    *,
    split: str | None = None,
    labels: Path | str | None = None,
    columns: Columns = Columns(),  # noqa: B008 (frozen)
    options: user_images.Options = user_images.DEFAULT,
    shard_size: int = SHARD_SIZE,
    threads: int = 8,
    check: bool = False,
    say: Callable[[str], None] = print,
) -> Report:
    """Writes the images of `src` as an image dataset `out`. Raises UserError.

    `shard_size` counts files; `split`, `labels` and `columns` are those of
    discovery.discover. If `out` has
    part of the same import, it is resumed; if it is complete, it is only reported. Existing shards
    are verified by their size; with `check` also by their checksum.
    """
    directory = epath.Path(out)
    if "://" not in str(src) and os.path.realpath(src) == os.path.realpath(out):
        raise UserError(f"{out} is the source itself: choose another --out")
    if shard_size < 1 or threads < 1:
        raise UserError(f"shard_size {shard_size} and threads {threads} must be at least 1")
    try:
        directory.exists()
    except ImportError as e:
        raise UserError(f"{directory} cannot be opened: {e}") from e
    images = discovery.discover(src, split=split, labels=labels, columns=columns, say=say)
    settings = import_settings.describe(src, images, shard_size, options, columns)
    import_settings.check_same_import(directory, settings)
    shards = {
        name: _shards(directory, name, index, shard_size) for name, index in images.splits.items()
    }
    infos = array_record_shards.shard_infos(directory)
    with ThreadPoolExecutor(threads) as pool:
        damaged = array_record_shards.damaged(directory, infos, pool, check=check)
    finished = ("dataset_info.json", array_record_shards.MANIFEST)
    if all((directory / name).exists() for name in finished) and not damaged:
        say(f"{directory} is finished: nothing to do")
        return _report(images, shards, infos)
    import_settings.check_decoding_version(directory, infos)
    counts = [f"{name} {counted(len(index), 'image')}" for name, index in images.splits.items()]
    classes = counted(len(images.classes), "class", "classes")
    say(f"{src}: {', '.join(counts)}, {classes}, {disk_space.size(images.num_bytes)}")
    infos = _keep_sound_shards(directory, infos, damaged, say)
    _check_disk_space(directory, images, infos)
    directory.mkdir(parents=True, exist_ok=True)
    array_record_shards.remove_partial_files(directory)
    import_settings.write(directory, settings)
    features = tfds_dataset.image_features(images.classes, images.keep)
    every_shard = {path: index for split in shards.values() for path, index in split.items()}
    infos = shard_writer.write_missing(every_shard, infos, features, options, threads, say)
    return _finish(src, directory, images, shards, infos)


def _finish(
    src, out: epath.Path, images: discovery.Discovered, shards: ShardImages, infos: ShardInfos
) -> Report:
    """Writes TFDS's metadata and the manifest of the complete shards. Raises UserError."""
    report = _report(images, shards, infos)
    if 0 in report.examples.values():
        if not any(report.examples.values()):
            _remove_output(out, shards)
        name = next(name for name, examples in report.examples.items() if not examples)
        raise UserError(
            f"none of {counted(len(images.splits[name]), 'image')} of {src} ({name}) could be "
            f"read; the first: {report.broken[0]}"
        )
    written = {name: [infos[path.name] for path in split] for name, split in shards.items()}
    features = tfds_dataset.image_features(images.classes, images.keep)
    tfds_dataset.write_metadata(out, features, written)
    array_record_shards.write_manifest(
        out, {path.name: infos[path.name] for split in shards.values() for path in split}
    )
    return report


def _remove_output(out: epath.Path, shards: ShardImages):
    """Removes the output of an import without a readable image, which no other could resume."""
    for path in (path for split in shards.values() for path in split):
        array_record_shards.remove(path)
    (out / import_settings.FILE).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # the directory has other files
        out.rmdir()


def _shards(out: epath.Path, split: str, images: Images, size: int) -> dict[epath.Path, Images]:
    count = -(-len(images) // size)
    return {
        tfds_dataset.shard_path(out, split, i, count): images.take(slice(i * size, (i + 1) * size))
        for i in range(count)
    }


def _keep_sound_shards(out: epath.Path, infos: ShardInfos, damaged: list[str], say) -> ShardInfos:
    """Returns the shards completed by an earlier command; invalidates the damaged ones."""
    if not infos:
        return {}
    for name in damaged:
        array_record_shards.invalidate(out / name)
    again = f", writing {counted(len(damaged), 'damaged one')} again" * bool(damaged)
    say(f"resuming {out}: keeping {counted(len(infos) - len(damaged), 'shard')}{again}")
    return {name: info for name, info in infos.items() if name not in damaged}


def _check_disk_space(out: epath.Path, images: discovery.Discovered, infos: ShardInfos):
    """Raises UserError if the disk lacks space for the missing shards."""
    needed = images.num_bytes - sum(info.bytes for info in infos.values())
    disk_space.require(out, needed, "free some, or choose another --out")


def _report(images: discovery.Discovered, shards: ShardImages, infos: ShardInfos) -> Report:
    examples = {
        name: sum(infos[path.name].records for path in split) for name, split in shards.items()
    }
    written = [infos[path.name] for split in shards.values() for path in split]
    broken = [line for info in written for line in shard_writer.unreadable(info)]
    transparent = sum(map(shard_writer.transparent, written))
    empty = sum(map(shard_writer.empty_texts, written), Counter())
    return Report(
        examples, images.classes, broken, transparent, dict(empty), images.skipped.lines()
    )
